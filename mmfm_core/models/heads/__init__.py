"""Heads: what a task reads from the fused state."""

from mmfm_core.config.model import Model
from mmfm_core.models.heads.classification import ClassificationHead

__all__ = ["ClassificationHead", "build_head"]


def build_head(model: Model, name: str) -> ClassificationHead:
    """The head `name`, with random weights."""
    return ClassificationHead(model.dim, len(model.heads[name].classes))
