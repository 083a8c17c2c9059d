"""Clipping engines: ways to compute one clipped gradient per patient, all with one signature and one result."""

from collections.abc import Mapping

from torch import nn

from mmfm_core.privacy.engines import bookkeeping, hooks, loop
from mmfm_core.privacy.engines.base import Clipped, Engine
from mmfm_core.privacy.engines.support import unsupported

__all__ = ["ENGINES", "Clipped", "Engine", "choose", "unsupported"]

ENGINES: dict[str, Engine] = {
    "loop": loop.clipped_sum,
    "bookkeeping": bookkeeping.clipped_sum,
    "hooks": hooks.clipped_sum,
}


def choose(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str:
    """The engine that 'auto' means: book-keeping where it sees every layer, else the loop."""
    return "loop" if unsupported(model, parameters) else "bookkeeping"
