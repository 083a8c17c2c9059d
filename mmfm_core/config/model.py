"""The `model` part of the document: modalities, encoders, fusion, heads. Closed registries of names, no import paths.

The document that a server sends to a hospital must not be able to name code: every `type` and `kind` is a literal.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from mmfm_core.config.strict import Choices, Name, Strict, did_you_mean


class Normalization(Strict):
    """Declared statistics: a public quantity, the same at every site."""

    mean: float
    std: float = Field(gt=0)


# In a union that is told apart by hand only the errors of the kind that was meant are reported.
Normalize = Annotated[
    Annotated[Literal["site"], Tag("site")] | Annotated[Normalization, Tag("declared")],
    Discriminator(lambda value: "site" if isinstance(value, str) else "declared"),
]


class ImageModality(Strict):
    """A 2D image, read as float in [0, 1], resized to `size` (height, width), then normalised."""

    kind: Literal["image2d"]
    channels: Literal[1, 3] = 1
    size: tuple[PositiveInt, PositiveInt]
    optional: bool = False
    normalize: Normalize = "site"


class TextModality(Strict):
    """Free text, cut after `max_length` tokens."""

    kind: Literal["text"]
    max_length: int = Field(default=128, ge=2)
    optional: bool = False


class NumericFeature(Strict):
    """A number. Without a declared `mean` and `std`, each site uses those of its own training studies."""

    normalize: Normalize = "site"


class CategoricalFeature(Strict):
    """One of a few named categories."""

    categories: Choices


def _kind_of_feature(value: Any) -> str:
    if isinstance(value, dict):
        return "numeric" if not value or "normalize" in value else "categorical"
    return "numeric" if isinstance(value, NumericFeature) else "categorical"


Feature = Annotated[
    Annotated[NumericFeature, Tag("numeric")] | Annotated[CategoricalFeature, Tag("categorical")],
    Discriminator(_kind_of_feature),
]


class TableModality(Strict):
    """A few columns of a record. A list of names is short for numeric features normalised at each site."""

    kind: Literal["tabular"]
    features: dict[Name, Feature] = Field(min_length=1)
    optional: bool = False

    @field_validator("features", mode="before")
    @classmethod
    def _list_is_short(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            value = dict.fromkeys(value)
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value


Modality = Annotated[ImageModality | TextModality | TableModality, Field(discriminator="kind")]


class VisionTransformer(Strict):
    """A timm vision transformer (Dosovitskiy et al. 2021)."""

    type: Literal["vit"]
    patch_size: PositiveInt = 8
    depth: PositiveInt = 4
    heads: PositiveInt = 3


class Bert(Strict):
    """A transformers BERT (Devlin et al. 2019), from random weights."""

    type: Literal["bert"]
    depth: PositiveInt = 4
    heads: PositiveInt = 3


class FeatureTokens(Strict):
    """One token per feature (FT-Transformer, Gorishniy et al. 2021)."""

    type: Literal["feature_tokens"]


Encoder = Annotated[VisionTransformer | Bert | FeatureTokens, Field(discriminator="type")]

ENCODERS_OF_KIND = {"image2d": ("vit",), "text": ("bert",), "tabular": ("feature_tokens",)}


class JointFusion(Strict):
    """Input-level fusion: the tokens of all modalities through one transformer."""

    type: Literal["joint"]
    depth: PositiveInt = 2
    heads: PositiveInt = 3
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)


class ConcatFusion(Strict):
    """Latent fusion: the modalities' embeddings side by side through an MLP."""

    type: Literal["concat"]
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)


class GatedFusion(Strict):
    """Latent fusion: a softmax gate over the modalities that are present."""

    type: Literal["gated"]
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)


Fusion = Annotated[JointFusion | ConcatFusion | GatedFusion, Field(discriminator="type")]


class ClassificationHead(Strict):
    """One class out of several. The site maps one of its columns to the head's name under `targets`."""

    type: Literal["classification"]
    classes: Choices


Head = Annotated[ClassificationHead, Field(discriminator="type")]


class ByteTokenizer(Strict):
    """UTF-8 bytes (ByT5): no vocabulary, so nothing that could hold a patient's name."""

    type: Literal["bytes"] = "bytes"


class Model(Strict):
    """Encoders, one fusion and the heads, all of one width `dim`."""

    dim: PositiveInt = 192
    tokenizer: ByteTokenizer = ByteTokenizer()
    modalities: dict[Name, Modality] = Field(min_length=1)
    encoders: dict[Name, Encoder]
    fusion: Fusion
    heads: dict[Name, Head] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "Model":
        for name, encoder in self.encoders.items():
            if name not in self.modalities:
                raise ValueError(f"encoders.{name}: there is no such modality; {did_you_mean(name, self.modalities)}")
            kind = self.modalities[name].kind
            if encoder.type not in ENCODERS_OF_KIND[kind]:
                fitting = ", ".join(ENCODERS_OF_KIND[kind])
                raise ValueError(f"encoders.{name}.type: '{encoder.type}' does not read {kind}; use {fitting}")
        for name, modality in self.modalities.items():
            if name not in self.encoders:
                fitting = ENCODERS_OF_KIND[modality.kind][0]
                raise ValueError(f"modalities.{name}: has no encoder; add 'encoders: {{{name}: {{type: {fitting}}}}}'")
            encoder = self.encoders[name]
            if isinstance(modality, ImageModality) and isinstance(encoder, VisionTransformer):
                for side in modality.size:
                    if side % encoder.patch_size:
                        raise ValueError(
                            f"modalities.{name}.size: {side} is not a multiple of the encoder's "
                            f"patch_size {encoder.patch_size}"
                        )
        for where, part in [(f"encoders.{n}", e) for n, e in self.encoders.items()] + [("fusion", self.fusion)]:
            heads = getattr(part, "heads", 1)
            if self.dim % heads:
                raise ValueError(f"{where}.heads: {heads} does not divide dim {self.dim}")
        return self
