"""Modalities: what a study may hold, and how it is brought to one form at every site."""

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from mmfm_core.config.strict import Choices, Name, Strict


class Normalization(Strict):
    """Declared statistics: a public quantity, the same at every site."""

    mean: float
    std: float = Field(gt=0)


# In a union that is told apart by hand only the errors of the kind that was meant are reported.
Normalize = Annotated[
    Annotated[Literal["site", "study", "foreground"], Tag("named")] | Annotated[Normalization, Tag("declared")],
    Discriminator(lambda value: "named" if isinstance(value, str) else "declared"),
]
"""'site': by the site's own training studies; 'study': each by itself (usual for MRI, which has no unit); 'foreground':
each by that part of itself which is brighter than its mean, so that neither air nor how much of it there is counts (a
head in MRI); declared."""


Axis = Literal["x", "y", "z"]
AXES: dict[int, dict[Axis, int]] = {2: {"x": -1, "y": -2}, 3: {"x": -3, "y": -2, "z": -1}}
"""Of an image, x runs to the right and y down; of a volume, x, y and z run to the patient's right, front and top."""


class Augment(Strict):
    """Random changes of an image in training, drawn anew for each study in each step.

    Attributes:
        mirror: axes along which half of the studies are mirrored, all their images that say so together. Not where left
            and right matter to a label or are named in a report.
        rotate: images are turned by up to this many degrees, around each axis of a volume, all of a study's together.
        scale: along each axis they become larger or smaller by up to this fraction, together.
        shift: along each axis they are moved by up to this fraction of their size, together.
        contrast: the image is multiplied by a factor within 1 plus or minus this.
        brightness: what is added is within plus or minus this, in units of the normalised image.
        noise: standard deviation of white noise, in the same units.
    """

    mirror: tuple[Axis, ...] = ()
    rotate: float = Field(default=0.0, ge=0, le=180)
    scale: float = Field(default=0.0, ge=0, lt=1)
    shift: float = Field(default=0.0, ge=0, lt=1)
    contrast: float = Field(default=0.0, ge=0, lt=1)
    brightness: NonNegativeFloat = 0.0
    noise: NonNegativeFloat = 0.0

    @property
    def moves(self) -> bool:
        """Whether places change, other than by mirrors."""
        return bool(self.rotate or self.scale or self.shift)

    @property
    def places(self) -> tuple[object, ...]:
        """What must be the same of two images for every place of one to stay where it is in the other."""
        return frozenset(self.mirror), self.rotate, self.scale, self.shift


class _Pixels(Strict):
    """What images and volumes have in common.

    Attributes:
        window: physical values (Hounsfield units, say) that become 0 and 1; what lies outside is clipped.
        augment: how training changes it at random. The features of a frozen trunk are then computed in every step.
    """

    window: tuple[float, float] | None = None
    optional: bool = False
    normalize: Normalize = "site"
    augment: Augment | None = None

    @model_validator(mode="after")
    def _window_is_open(self) -> "_Pixels":
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("window: must be [low, high] with low below high")
        return self


class ImageModality(_Pixels):
    """A 2D image, resized to `size` (height, width), then normalised. PNG and JPEG are read as 0 to 1."""

    kind: Literal["image2d"]
    channels: Literal[1, 3] = 1
    size: tuple[PositiveInt, PositiveInt]

    @model_validator(mode="after")
    def _has_no_depth(self) -> "ImageModality":
        if self.augment and "z" in self.augment.mirror:
            raise ValueError("augment.mirror: an image has the axes x and y")
        return self


class VolumeModality(_Pixels):
    """A 3D volume, turned to RAS+ orientation and brought to `size` voxels along x, y, z.

    Attributes:
        spacing: voxel size in mm to resample to before cropping or padding to `size`; without it the whole volume is
            resized.
        assume_oriented: read a NIfTI that does not say how it is oriented as RAS+, instead of refusing it.
    """

    kind: Literal["volume3d"]
    size: tuple[PositiveInt, PositiveInt, PositiveInt]
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    assume_oriented: bool = False


class TextModality(Strict):
    """Free text, cut after `max_length` tokens."""

    kind: Literal["text"]
    max_length: int = Field(default=128, ge=2)
    optional: bool = False


class NumericFeature(Strict):
    """A number. Without a declared `mean` and `std`, each site uses those of its own training studies."""

    normalize: Annotated[
        Annotated[Literal["site"], Tag("site")] | Annotated[Normalization, Tag("declared")],
        Discriminator(lambda value: "site" if isinstance(value, str) else "declared"),
    ] = "site"


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


PixelModality = ImageModality | VolumeModality
Modality = Annotated[ImageModality | VolumeModality | TextModality | TableModality, Field(discriminator="kind")]
