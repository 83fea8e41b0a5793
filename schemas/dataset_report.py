"""The report of `zscl data check` about a task folder, and the manifest of such a folder."""

from typing import Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from schemas.base import StrictModel, TupleOf

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

Reason = Literal[
    "truncated image",
    "not an image",
    "broken image",
    "decompression bomb",
    "no image member",
    "unsupported image format",
    "several members of a kind",
    "link",
    "no label",
    "label outside the class list",
]


class ManifestShard(BaseModel):
    """The entry for one shard in a manifest. Unknown fields, which later versions may add, are ignored."""

    file: str
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """The fields of `zscl.json` that are validated. Unknown fields, which later versions may add, are ignored."""

    splits: dict[str, list[ManifestShard]]


class PixelRange(StrictModel):
    """Minimum, median and maximum of the widths or heights of images, in pixels."""

    min: PositiveInt
    median: PositiveInt
    max: PositiveInt


class SplitFinding(StrictModel):
    """Statistics of a split. Only images that can be decoded and whose label is in the class list are counted."""

    split: Split
    shards: NonNegativeInt = Field(description="Number of shards according to nshards.txt")
    samples: NonNegativeInt = Field(description="All samples of the undamaged shards, readable or not")
    images: NonNegativeInt
    per_class: TupleOf[NonNegativeInt] = Field(description="Images of each class, in label order")
    empty_classes: TupleOf[NonNegativeInt] = Field(description="Labels without images in the split")
    width: PixelRange | None
    height: PixelRange | None
    formats: dict[str, int]
    modes: dict[str, int] = Field(description="Images by PIL mode: RGB, L (grey), P (palette), ...")


class ShardFinding(StrictModel):
    """The number of samples, the size and the problems of a shard."""

    shard: str = Field(description="Path relative to the task's folder, as in all fields named shard")
    samples: NonNegativeInt | None = Field(description="None if the shard is missing or damaged")
    bytes: NonNegativeInt | None = Field(description="None if the shard is missing")
    problems: TupleOf[str]


class UnreadableSample(StrictModel):
    """A sample that training cannot use."""

    shard: str
    key: str
    reason: Reason
    detail: str


class UnreadableSamples(StrictModel):
    """The samples that training cannot use: their number, the reasons and the first samples."""

    samples: NonNegativeInt
    reasons: dict[Reason, int] = Field(description="Samples by reason; a sample may count for several reasons")
    first: TupleOf[UnreadableSample]


class DuplicateImage(StrictModel):
    """One image of a pair of duplicates."""

    shard: str
    key: str
    label: int | None = Field(description="None if it is missing or outside the class list")


class DuplicatePair(StrictModel):
    """Two images with the same encoded bytes."""

    first: DuplicateImage
    again: DuplicateImage


class Duplicates(StrictModel):
    """Repeated images.

    Each repeated image is paired with the first image that has the same bytes, in the order train, test.
    """

    pairs: NonNegativeInt
    of_other_label: NonNegativeInt = Field(description="Pairs with different labels")
    first: TupleOf[DuplicatePair]


class RepeatedName(StrictModel):
    """A class name that occurs for several labels."""

    name: str
    labels: TupleOf[NonNegativeInt]


class ClassNames(StrictModel):
    """The class names in `classnames.txt`, with repeated names and labels without a name or without images."""

    names: TupleOf[str]
    repeated: TupleOf[RepeatedName]
    empty: TupleOf[NonNegativeInt] = Field(description="Labels without a name")
    unused: TupleOf[NonNegativeInt] = Field(description="Labels without images in both splits")


class Templates(StrictModel):
    """The templates in `zeroshot_classification_templates.txt`; repeated and invalid ones are listed separately."""

    templates: TupleOf[str]
    repeated: TupleOf[str]
    without_place: TupleOf[str] = Field(description="Templates without a {c}")


class DatasetReport(StrictModel):
    """The report about a task folder: splits, shards, duplicates, class names, templates and problems."""

    task: str
    path: str
    splits: TupleOf[SplitFinding]
    shards: TupleOf[ShardFinding]
    manifest: bool = Field(description="Whether the shards were compared with a manifest")
    unreadable: UnreadableSamples
    between_splits: Duplicates = Field(description="Test images that are also training images")
    within_splits: Duplicates
    classnames: ClassNames
    templates: Templates
    problems: TupleOf[str] = Field(description="Problems to fix before training, one message each")
    warnings: TupleOf[str] = Field(description="Warnings, one message each")
