"""Fusion: the modalities' tokens in, one state per study out. Every fusion takes any subset of modalities."""

from mmfm_core.config.model import ConcatFusion as ConcatConfig
from mmfm_core.config.model import GatedFusion as GatedConfig
from mmfm_core.config.model import JointFusion as JointConfig
from mmfm_core.config.model import Model
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.fusion.joint import JointFusion
from mmfm_core.models.fusion.pooled import ConcatFusion, GatedFusion


def build_fusion(model: Model) -> Fusion:
    """The fusion over all modalities of the document, whichever a site holds: its shape is the same everywhere."""
    modalities = list(model.modalities)
    match model.fusion:
        case JointConfig() as config:
            return JointFusion(modalities, model.dim, config)
        case ConcatConfig() as config:
            return ConcatFusion(modalities, model.dim, config.modality_dropout)
        case GatedConfig() as config:
            return GatedFusion(modalities, model.dim, config.modality_dropout)
