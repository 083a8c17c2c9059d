"""Clipping engines: ways to compute one clipped gradient per patient, all with one signature and one result."""

from mmfm_core.privacy.engines import loop
from mmfm_core.privacy.engines.base import Clipped, Engine

__all__ = ["ENGINES", "Clipped", "Engine"]

ENGINES: dict[str, Engine] = {"loop": loop.clipped_sum}
