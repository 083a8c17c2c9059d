"""What frozen trunks make of a site's studies, computed once and kept in the site's directory.

A trunk that nobody trains gives the same features in every round of every run, so that rounds cost only what is behind
it. They are derived from patients: they stay at the site, like the images, and may be deleted at any time. They are
kept as half-precision numbers (11 bits, largest 65504), and used as such from the first time on, so that a second run
equals the first.
"""

import hashlib
import logging
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfm_core.config.model import Model
from mmfm_core.data.cache import used
from mmfm_core.data.dataset import Dataset
from mmfm_core.errors import MmfmError
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.model import MultimodalModel
from mmfm_core.storage import Tensors, read_tensors, write_tensors

BATCH = 32
PATIENCE = 2.0  # seconds without a word

log = logging.getLogger(__name__)


def with_features(
    dataset: Dataset, model: MultimodalModel, config: Model, frozen: Collection[str], cache: Path
) -> Dataset:
    """The dataset with the features of every encoder whose whole trunk is among the names `frozen`.

    Stacked images are left out: what stands for a missing contrast is learned before the trunk. So are those that
    training changes at random.
    """
    everything, features = dataset.everything, {}
    for name, modalities in model.inputs_of.items():
        encoder = model.encoders[name]
        assert isinstance(encoder, Encoder)
        owner = getattr(encoder, "share_with", name)
        trunk = trunk_of(model, owner)
        changed = getattr(config.modalities[modalities[0]], "augment", None)
        if len(modalities) > 1 or modalities[0] not in everything.inputs or not trunk.keys() <= set(frozen) or changed:
            continue
        rows = everything.present[modalities[0]].nonzero().flatten().tolist()
        described = f"{config.encoders[owner].model_dump_json()}{config.tokenizer.model_dump_json()}"
        folder = cache / _hash([described.encode(), *_pieces(trunk)])
        inputs = everything.inputs[modalities[0]]
        features[name] = _spread(list(_kept(encoder, name, inputs, rows, folder)), rows, len(dataset))
    return replace(dataset, everything=replace(everything, features=features))


def trunk_of(model: MultimodalModel, name: str) -> dict[str, Tensor]:
    """The part of the model's state that an encoder's features depend on; empty where it has no weights at all."""
    encoder = model.encoders[name]
    assert isinstance(encoder, Encoder)
    return {
        f"encoders.{name}.{key}": tensor
        for key, tensor in encoder.state_dict().items()
        if key.partition(".")[0] not in encoder.BESIDE
    }


def _kept(encoder: Encoder, name: str, inputs: Tensor, rows: list[int], folder: Path) -> Iterator[Tensor]:
    """The features of each row, [S, N, W] half: those in `folder` under the hash of the row's input, or new ones."""
    keys = {row: _hash(_pieces({"": inputs[row]})) for row in rows}
    known = _read(folder, set(keys.values()))
    new = [row for row, key in keys.items() if key not in known]
    encoder.eval()
    device = next(encoder.parameters()).device
    said = time.monotonic()
    for start in range(0, len(new), BATCH):
        some = new[start : start + BATCH]
        with torch.inference_mode():
            computed = encoder.features(inputs[some].to(device))
        most = torch.finfo(torch.float16).max
        shard = {keys[row]: f.clamp(-most, most).half().cpu().numpy() for row, f in zip(some, computed, strict=True)}
        write_tensors(folder / f"{_hash(key.encode() for key in shard)}.safetensors", shard)
        known |= shard
        if time.monotonic() - said > PATIENCE:
            log.info("features of '%s': %d of %d studies", name, start + len(some), len(new))
            said = time.monotonic()
    return (torch.from_numpy(known[key]) for key in keys.values())


def _read(folder: Path, wanted: Collection[str]) -> Tensors:
    known: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(MmfmError):  # a damaged file is as good as none: what it held is computed again
            found = {key: array for key, array in read_tensors(path).items() if key in wanted}
            if found:
                used(path)
            known |= found
    return known


def _spread(features: list[Tensor], rows: list[int], studies: int) -> Tensor:
    """[studies, S, most N, W] with zeros in other studies, and behind the features of a shorter text."""
    longest = max(f.shape[1] for f in features)
    spread = torch.zeros(studies, features[0].shape[0], longest, features[0].shape[2], dtype=torch.float16)
    for row, f in zip(rows, features, strict=True):
        spread[row, :, : f.shape[1]] = f
    return spread


def _pieces(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        yield f"{name} {array.dtype} {array.shape} ".encode()
        yield array.tobytes()


def _hash(pieces: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
