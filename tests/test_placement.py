"""Models on another device than the data: nothing is left behind, and the figures are the same."""

import pandas as pd
import pytest
import torch
from elsewhere import DEVICE, on_the_device, there
from test_combinations import document, random_batch

from mmfm_core.config.model import Model
from mmfm_core.models.model import full_model
from mmfm_core.models.tasks import Encoding
from mmfm_core.registry import FUSIONS, HEADS, OBJECTIVES

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
