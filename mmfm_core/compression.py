"""What travels in fewer bits: the shared state in half precision, a site's update in half precision or as int8.

An update is rounded in blocks, each with a scale of its own (Dettmers et al. 2022, section 2.1, with equal steps), and
what rounding took is added to the site's next update (error feedback: Seide et al. 2014; Karimireddy et al. 2019), so
that the sum of what arrives stays within one rounding of the sum of what was learned.
"""

from collections.abc import Mapping

import numpy as np

from mmfm_core.config.federation import UpdateFormat
from mmfm_core.errors import MmfmError
from mmfm_core.storage import Tensors

BLOCK = 256
"""Values that share a scale of 4 bytes."""

SCALE = "scale/"
"""Before a tensor's name in messages: the scales of its blocks, [blocks]."""

LOST = "lost/"
"""Before a tensor's name in what a site keeps: what rounding took from its last update."""

LEVELS = 127


def narrowed(state: Tensors) -> Tensors:
    """A state in half precision; what is not of floating point stays.

    Raises:
        MmfmError: a value is beyond half precision.
    """
    with np.errstate(over="ignore"):
        narrow = {name: tensor.astype(np.float16) if _is_real(tensor) else tensor for name, tensor in state.items()}
    for name, tensor in narrow.items():
        if _is_real(tensor) and not np.isfinite(tensor).all():
            raise MmfmError(f"aggregation.wire.state: '{name}' has values beyond half precision; send it as fp32")
    return narrow


def widened(state: Tensors, like: Mapping[str, np.ndarray]) -> Tensors:
    """A state in the types that it has at the site."""
    return {name: tensor.astype(like[name].dtype, copy=False) for name, tensor in state.items()}


def closed(before: Tensors, after: Tensors, kept: Tensors, form: UpdateFormat) -> tuple[Tensors, Tensors]:
    """The update from `before` to `after` as it travels, and what rounding took (`LOST` + name), to be kept.

    Args:
        kept: what was kept from the update before; names without `LOST` are not looked at.
    """
    if form == "fp32":
        return after, {}
    sent: Tensors = {}
    lost: Tensors = {}
    for name, tensor in after.items():
        if not _is_real(tensor):
            sent[name] = tensor
            continue
        update = tensor - before[name] + kept.get(LOST + name, np.zeros((), tensor.dtype))
        rounded = _rounded(name, update, form)
        sent |= rounded
        lost[LOST + name] = update - _read(name, rounded, update.dtype)
    return sent, lost


def opened(sent: Tensors, base: Mapping[str, np.ndarray], form: UpdateFormat) -> Tensors:
    """The state that a site's update stands for, on top of `base`, which has every name that was asked for.

    Raises:
        MmfmError: names, shapes or types are not those of an update of `base`.
    """
    if form == "fp32":
        return sent
    expected = {name: like for b, tensor in base.items() for name, like in _form_of(b, tensor, form).items()}
    for name in [*expected, *sent]:
        if name not in sent or name not in expected:
            raise MmfmError(f"of its update, '{name}' is {'missing' if name in expected else 'not asked for'}")
        (shape, kind), got = expected[name], sent[name]
        if got.shape != shape or got.dtype != kind:
            raise MmfmError(f"of its update, '{name}' is {got.dtype}{list(got.shape)}, expected {kind}{list(shape)}")
    return {n: like + _read(n, sent, like.dtype) if _is_real(like) else sent[n] for n, like in base.items()}


def bytes_of(tensors: Mapping[str, np.ndarray], form: UpdateFormat) -> int:
    """How many bytes an update of these tensors, or in half precision they themselves, travel in."""
    parts = [part for name, tensor in tensors.items() for part in _form_of(name, tensor, form).values()]
    return sum(int(np.prod(shape)) * kind.itemsize for shape, kind in parts)


def _form_of(name: str, like: np.ndarray, form: UpdateFormat) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    if form == "fp32" or not _is_real(like):
        return {name: (like.shape, like.dtype)}
    if form == "fp16":
        return {name: (like.shape, np.dtype(np.float16))}
    blocks = -(-like.size // BLOCK)
    return {name: (like.shape, np.dtype(np.int8)), SCALE + name: ((blocks,), np.dtype(np.float32))}


def _rounded(name: str, update: np.ndarray, form: UpdateFormat) -> Tensors:
    if form == "fp16":
        most = np.finfo(np.float16).max
        return {name: update.clip(-most, most).astype(np.float16)}
    blocks = _blocks(update)
    largest = np.abs(blocks).max(1)
    scales = (largest / LEVELS).astype(np.float32)
    small = scales * LEVELS < largest  # rounded down, which among the smallest numbers is a whole step or more
    scales[small] = np.nextafter(scales[small], np.float32(np.inf))
    steps = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] > 0)
    levels = np.rint(steps).clip(-LEVELS, LEVELS).astype(np.int8)
    return {name: levels.ravel()[: update.size].reshape(update.shape), SCALE + name: scales}


def _read(name: str, sent: Tensors, kind: np.dtype) -> np.ndarray:
    if SCALE + name not in sent:
        return sent[name].astype(kind)
    values = _blocks(sent[name].astype(kind)) * sent[SCALE + name].astype(kind)[:, None]
    return values.ravel()[: sent[name].size].reshape(sent[name].shape)


def _blocks(tensor: np.ndarray) -> np.ndarray:
    return np.pad(tensor.ravel(), (0, -tensor.size % BLOCK)).reshape(-1, BLOCK)


def _is_real(tensor: np.ndarray) -> bool:
    return tensor.dtype.kind == "f"
