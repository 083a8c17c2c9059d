"""Models on another device than the data: nothing is left behind, and the figures are the same."""

import pandas as pd
import pytest
import torch
from elsewhere import DEVICE, on_the_device, there
from test_combinations import document, random_batch
from tiny import MODALITIES, prepare_run, tiny_federation, write_sites

from client.agent import Agent
from client.loading import arrays, load
from mmfm_core.config import load_sites
from mmfm_core.config.loading import sha256
from mmfm_core.config.model import Model
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tasks import Encoding
from mmfm_core.protocol import Describe, Refusal
from mmfm_core.registry import FUSIONS, HEADS, OBJECTIVES
from mmfm_core.storage import packed, unpacked

TASKS = (*HEADS, *OBJECTIVES)


def test_the_device_that_is_not_there_notices_what_is_left_behind():
    layer = torch.nn.Linear(3, 2)
    with on_the_device(layer):
        assert layer(torch.ones(1, 3).to(DEVICE)).device == DEVICE
        assert torch.arange(3, device=DEVICE).device == DEVICE
        with pytest.raises(RuntimeError, match="two devices"):
            layer(torch.ones(1, 3))
        with pytest.raises(RuntimeError, match="two devices"):
            there(torch.ones(3)) + torch.ones(3)


@pytest.mark.parametrize(("task", "fusion"), [*((t, "joint") for t in TASKS), *(("findings", f) for f in FUSIONS)])
def test_losses_and_predictions_on_a_device_are_those_on_the_processor(task, fusion):
    config = Model.model_validate(document(task, fusion))
    everything = tuple(config.modalities)
    torch.manual_seed(0)
    batch = random_batch(task, config, everything, everything)
    model = full_model(config, seed=0)

    def found():
        torch.manual_seed(1)  # of what is masked
        losses = model.eval().losses(batch, ["task"])["task"].tolist()
        head = model.heads["task"] if task in HEADS else None
        return losses, pd.DataFrame(head.predict(Encoding(model, batch)) if head else {})

    with torch.no_grad():
        losses, predictions = found()
    with on_the_device(model):
        assert model.device == DEVICE
        model.train().losses(batch, ["task"])  # what only training does; its dropout draws in another order
        moved_losses, moved_predictions = found()
    assert moved_losses == pytest.approx(losses, rel=1e-4, nan_ok=True)
    pd.testing.assert_frame_equal(moved_predictions, predictions, rtol=1e-4)


def test_the_state_of_a_model_on_a_device_goes_to_arrays_and_back(monkeypatch):
    monkeypatch.setattr(MultimodalModel, "device", DEVICE)
    config = Model.model_validate(document("classification", "joint"))
    model, other = full_model(config, seed=0), full_model(config, seed=1)
    state = unpacked(packed(arrays(model)))  # as it comes in a message: not to be written to
    load(other, state)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_device_that_is_not_there_is_refused_with_what_to_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    (site,) = write_sites(tmp_path / "data", {"north": MODALITIES}).values()
    federation = tiny_federation()
    run = prepare_run(tmp_path / "run", federation, {"north": site.model_copy(update={"device": "cuda"})})
    answer = Agent.open(run / "sites" / "north", durable=False).answer(Describe(sha256(federation)))
    assert isinstance(answer, Refusal)
    assert "device: torch finds no CUDA device" in answer.reason
    assert "device: cpu" in answer.reason


@pytest.mark.parametrize(("field", "other"), [("device", "cuda"), ("precision", "bfloat16")])
def test_sites_of_a_simulation_share_one_model_and_how_it_computes(tmp_path, field, other):
    path = tmp_path / "sites.yaml"
    sites = f"north: {{{field}: {other}}}\n  south: {{}}"
    path.write_text(f"defaults: {{manifest: m.csv, modalities: {{scan: scan}}}}\nsites:\n  {sites}\n")
    with pytest.raises(MmfmError, match=rf"sites\.yaml: the sites of a simulation compute with one {field}"):
        load_sites(path)
