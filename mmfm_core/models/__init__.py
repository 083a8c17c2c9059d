"""Encoders, fusion, heads, and the policy that says which of their parameters are shared."""

from mmfm_core.models import _torchvision_ops  # noqa: F401  (must come before timm and torchmetrics)
