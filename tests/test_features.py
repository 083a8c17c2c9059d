"""Features of frozen trunks: what is kept is what would be computed, and nothing else is ever taken for it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import prepare_run, tiny_federation, write_sites
from torch import Tensor

import client.agent
from client.agent import Agent
from mmfm_core.config import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.data import features
from mmfm_core.data.dataset import Dataset, load_dataset
from mmfm_core.data.features import with_features
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.encoders.bert import TextEncoder
from mmfm_core.models.encoders.vit import ImageEncoder
from mmfm_core.models.model import MultimodalModel
from mmfm_core.models.tasks import Encoding
from mmfm_core.protocol import RoundReply, RoundRequest
from server.record import Run
from server.simulation import prepare

TRUNKS = ["encoders.scan.vit.*", "encoders.scan.position.*", "encoders.note.bert.*"]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many studies' features each call of a trunk computed, of any encoder."""
    sizes: list[int] = []

    def counted(trunk: Any) -> Any:
        def count(self: Encoder, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return trunk(self, x)

        return count

    for encoder in (TextEncoder, ImageEncoder):
        monkeypatch.setattr(encoder, "features", counted(encoder.features))
    yield sizes


def frozen_trunks(**changes: Any) -> Federation:
    return tiny_federation(parameters={"shared": ["*"], "frozen": TRUNKS}, **changes)


def read(folder: Path, federation: Federation) -> Dataset:
    return load_dataset(write_sites(folder, {"north": ("scan", "note", "labs")})["north"], federation.model)


def build(federation: Federation, dataset: Dataset, seed: int = 0) -> MultimodalModel:
    return MultimodalModel(federation.model, dataset.everything.inputs, ["disease"], seed)


def everything_of(model: MultimodalModel, *encoders: str) -> list[str]:
    return [name for name in model.state_dict() if name.split(".")[1] in encoders]


def test_kept_features_are_what_the_trunk_computes(tmp_path: Path) -> None:
    federation = frozen_trunks()
    dataset = read(tmp_path, federation)
    model = build(federation, dataset).eval()
    kept = with_features(dataset, model, federation.model, everything_of(model, "scan", "note", "labs"), tmp_path / "c")
    assert set(kept.everything.features) == {"scan", "note", "labs"}
    with_them = Encoding(model, kept.everything).parts
    for name, part in Encoding(model, dataset.everything).parts.items():
        assert torch.equal(with_them[name].mask, part.mask), name
        torch.testing.assert_close(with_them[name].x[part.mask], part.x[part.mask], rtol=2e-3, atol=2e-3)
    expected = model(dataset.everything, ["disease"])["disease"]
    torch.testing.assert_close(model(kept.everything, ["disease"])["disease"], expected, rtol=1e-3, atol=1e-3)
    for row in (0, 3, len(dataset) - 1):
        alone = model(kept.batch([row]), ["disease"])["disease"]
        torch.testing.assert_close(alone[0], expected[row], rtol=1e-3, atol=1e-3)


class Unread(dict[str, Tensor]):
    """Inputs of which one must not be asked for."""

    def __getitem__(self, name: str) -> Tensor:
        assert name != "scan", "the images were taken, and features stand for them"
        return super().__getitem__(name)


def test_a_step_on_kept_features_does_not_touch_the_images(tmp_path: Path) -> None:
    federation = frozen_trunks()
    dataset = read(tmp_path, federation)
    model = build(federation, dataset)
    kept = with_features(dataset, model, federation.model, everything_of(model, "scan"), tmp_path / "c")
    blind = replace(kept, everything=replace(kept.everything, inputs=Unread(kept.everything.inputs)))
    expected = model.eval().losses(kept.batch([0, 3]), ["disease"])["disease"]
    assert torch.equal(model.losses(blind.batch([0, 3]), ["disease"])["disease"], expected)
    model.train().losses(blind.batch([0, 3]).rows([1]), ["disease"])["disease"].sum().backward()


def test_a_trunk_that_is_trained_in_part_is_not_kept(tmp_path: Path) -> None:
    federation = frozen_trunks()
    dataset = read(tmp_path, federation)
    model = build(federation, dataset)
    whole = everything_of(model, "scan", "note", "labs")
    trained = {"encoders.scan.vit.blocks.0.mlp.fc1.bias", "encoders.note.modality_embedding.weight"}
    kept = with_features(dataset, model, federation.model, set(whole) - trained, tmp_path / "c")
    assert set(kept.everything.features) == {"note", "labs"}, "the type embedding comes after the trunk"
    assert not with_features(dataset, model, federation.model, [], tmp_path / "d").everything.features
    assert not (tmp_path / "d").exists()


def test_nothing_is_computed_twice_and_nothing_stale_is_used(tmp_path: Path, computed: list[int]) -> None:
    federation = frozen_trunks()
    dataset = read(tmp_path, federation)
    scans = int(dataset.everything.present["scan"].sum())

    def keep(dataset: Dataset, model: MultimodalModel, federation: Federation = federation) -> Tensor:
        computed.clear()
        kept = with_features(dataset, model, federation.model, everything_of(model, "scan"), tmp_path / "cache")
        return kept.everything.features["scan"]

    model = build(federation, dataset)
    first = keep(dataset, model)
    assert sum(computed) == scans
    assert torch.equal(keep(dataset, build(federation, dataset)), first)
    assert sum(computed) == 0, "another process with the same weights finds them"

    images = dataset.everything.inputs["scan"].clone()
    row = int(dataset.everything.present["scan"].nonzero()[4])
    images[row] += 0.01  # as another normalisation would do
    changed = replace(dataset, everything=replace(dataset.everything, inputs={"scan": images}))
    again = keep(changed, model)
    assert sum(computed) == 1
    others = torch.arange(len(dataset)) != row
    assert torch.equal(again[others], first[others])
    assert not torch.equal(again[row], first[row])

    with torch.no_grad():
        model.encoders["scan"].modality_embedding.weight.add_(1)
    assert torch.equal(keep(dataset, model), first)
    assert sum(computed) == 0, "what comes after the trunk does not matter"
    with torch.no_grad():
        model.encoders["scan"].vit.norm.bias[3] += 0.01
    assert not torch.equal(keep(dataset, model), first)
    assert sum(computed) == scans, "another weight"

    document = federation.model_dump(mode="json")
    document["model"]["encoders"]["scan"]["heads"] = 4  # the same weights in another arrangement
    other = Federation.model_validate(document)
    arranged = build(other, dataset)
    arranged.load_state_dict(build(federation, dataset).state_dict())
    assert not torch.equal(keep(dataset, arranged, other), first)
    assert sum(computed) == scans, "another description of the encoder"


def test_a_kill_loses_at_most_one_batch_and_a_damaged_file_is_made_again(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = frozen_trunks()
    dataset = read(tmp_path, federation)
    model = build(federation, dataset)
    monkeypatch.setattr(features, "BATCH", 8)
    write, written = features.write_tensors, []

    def die_at_the_third(path: Path, tensors: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tensors)

    def keep() -> Tensor:
        computed.clear()
        kept = with_features(dataset, model, federation.model, everything_of(model, "scan"), tmp_path / "cache")
        return kept.everything.features["scan"]

    monkeypatch.setattr(features, "write_tensors", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        keep()
    monkeypatch.setattr(features, "write_tensors", write)
    whole = keep()
    assert sum(computed) == int(dataset.everything.present["scan"].sum()) - 16
    written[0].write_bytes(written[0].read_bytes()[:100])
    assert torch.equal(keep(), whole)
    assert sum(computed) == 8
    keep()
    assert sum(computed) == 0


def test_long_work_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    federation = frozen_trunks()
    dataset = read(tmp_path, federation)
    model = build(federation, dataset)
    monkeypatch.setattr(features, "PATIENCE", -1.0)
    monkeypatch.setattr(features, "BATCH", 8)
    with caplog.at_level(logging.INFO):
        with_features(dataset, model, federation.model, everything_of(model, "scan"), tmp_path / "cache")
    scans = int(dataset.everything.present["scan"].sum())
    assert f"features of 'scan': 8 of {scans} studies" in caplog.text


def rounds(run: Path, federation: Federation) -> list[RoundReply]:
    agent = Agent.open(run / "sites" / "north")
    replies, tensors = [], None
    for number in (1, 2, 3):
        if tensors is None:
            p = agent.participate(sha256(federation))
            tensors = {name: p.initial[name] for name, fate in p.fates.items() if fate == "shared"}
        reply = agent.answer(RoundRequest(sha256(federation), number, tensors))
        assert isinstance(reply, RoundReply), reply
        replies.append(reply)
        tensors |= reply.tensors
    return replies


def test_a_site_that_keeps_features_answers_as_one_that_does_not(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = frozen_trunks().model_dump(mode="json")
    document["model"]["fusion"]["modality_dropout"] = 0.0
    federation = Federation.model_validate(document)
    sites = write_sites(tmp_path / "data", {"north": ("scan", "note", "labs")})
    kept = rounds(prepare_run(tmp_path / "kept", federation, sites), federation)
    assert max(computed) <= features.BATCH
    studies = sum(computed)
    computed.clear()
    rounds(tmp_path / "kept", federation)
    assert sum(computed) == 0
    monkeypatch.setattr(client.agent, "with_features", lambda dataset, *_: dataset)
    plain = rounds(prepare_run(tmp_path / "plain", federation, sites), federation)
    assert sum(computed) > 3 * studies, "without, they are computed in every round"
    for with_them, without in zip(kept, plain, strict=True):
        assert with_them.tensors.keys() == without.tensors.keys()
        assert not [name for name in with_them.tensors if name.startswith("encoders.scan.vit.")]
        for metric, expected in zip(with_them.metrics, without.metrics, strict=True):
            assert metric.value == pytest.approx(expected.value, abs=5e-3), metric
        assert with_them.loss == pytest.approx(without.loss, rel=1e-3)


def test_runs_beside_each_other_share_what_frozen_trunks_made(tmp_path: Path, computed: list[int]) -> None:
    federation = frozen_trunks()
    sites = write_sites(tmp_path / "data", {"north": ("scan", "note", "labs")})
    for name in ("first", "second"):
        computed.clear()
        prepare(tmp_path / name, federation, sites, tmp_path / ".features", expected_sites=1)
        Agent.open(tmp_path / name / "sites" / "north").participate(sha256(federation))
        assert (sum(computed) > 0) == (name == "first")
    Run(tmp_path / "second").delete()
    assert list((tmp_path / ".features").iterdir()), "deleting a run leaves what others use"
