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
    """The engine that 'auto' means: book-keeping where it sees every layer, else the loop.

    By `benchmarks/results/clipping.md`, book-keeping takes 1.1 to 1.5 times the time of a step without privacy on all
    models, and 1.0 to 1.4 times its memory; the loop 1.0 to 1.6 times the time from 128 tokens on, and 3.1 to 5.9
    below. Where memory is short, name the loop: its own hardly grows with the batch (30 MB against 439 at 8 images of
    576 tokens, 30 against 1769 at 32).

    What only a pass can show, book-keeping refuses with an error; it is then the caller's to take the loop.
    """
    return "loop" if unsupported(model, parameters) else "bookkeeping"
