"""Encoders: one modality in, tokens of the model's width out. Each carries its own modality type embedding."""

from torch import nn

from mmfm_core.config.model import Bert, ImageModality, Model, TableModality, TextModality, VisionTransformer
from mmfm_core.models.encoders.image import ImageEncoder
from mmfm_core.models.encoders.table import TableEncoder
from mmfm_core.models.encoders.text import TextEncoder


def build_encoder(model: Model, name: str) -> nn.Module:
    """The encoder of the modality `name`, with random weights."""
    modality, encoder = model.modalities[name], model.encoders[name]
    match modality, encoder:
        case ImageModality(), VisionTransformer():
            return ImageEncoder(model.dim, modality, encoder)
        case TextModality(), Bert():
            return TextEncoder(model.dim, modality, encoder)
        case TableModality(), _:
            return TableEncoder(model.dim, modality)
    raise AssertionError(f"the document let {encoder.type} read {modality.kind}")
