"""What `zscl data check` finds in a task folder."""

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
    """What a manifest says of a shard; fields of later versions are left alone."""

    file: str
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """`zscl.json` as far as it can be checked; fields of later versions are left alone."""

    splits: dict[str, list[ManifestShard]]


class Extent(StrictModel):
    """Smallest, middle and largest of a number of pixels."""

    min: PositiveInt
    median: PositiveInt
    max: PositiveInt


class SplitFinding(StrictModel):
    """A split in figures. An image counts where it can be decoded and its label is in the class list."""

    split: Split
    shards: NonNegativeInt = Field(description="That nshards.txt promises")
    samples: NonNegativeInt = Field(description="Of every kind, readable or not, in the shards that are whole")
    images: NonNegativeInt
    per_class: TupleOf[NonNegativeInt] = Field(description="Images of each class, in label order")
    empty_classes: TupleOf[NonNegativeInt] = Field(description="Labels of which the split has no image")
    width: Extent | None
    height: Extent | None
    formats: dict[str, int]
    modes: dict[str, int] = Field(description="PIL's: RGB, L for grey, P for a palette, ...")


class ShardFinding(StrictModel):
    """A shard: what is there, and what is wrong with it."""

    shard: str = Field(description="Relative to the task's folder, as every shard here")
    samples: NonNegativeInt | None = Field(description="None where the shard is missing or broken")
    bytes: NonNegativeInt | None = Field(description="None where the shard is missing")
    problems: TupleOf[str]


class UnreadableSample(StrictModel):
    """A sample that training cannot use."""

    shard: str
    key: str
    reason: Reason
    detail: str


class Unreadable(StrictModel):
    """Samples that training cannot use."""

    samples: NonNegativeInt
    reasons: dict[Reason, int] = Field(description="A sample with a broken image and no label counts in both")
    first: TupleOf[UnreadableSample]


class SeenImage(StrictModel):
    """One of two images that are the same."""

    shard: str
    key: str
    label: int | None = Field(description="None where it is missing or outside the class list")


class DuplicatePair(StrictModel):
    """Two images of the same encoded bytes."""

    first: SeenImage
    again: SeenImage


class Duplicates(StrictModel):
    """Images that are there again, each paired with the first one of the same bytes (train comes before test)."""

    pairs: NonNegativeInt
    of_other_label: NonNegativeInt = Field(description="Pairs whose two labels differ")
    first: TupleOf[DuplicatePair]


class RepeatedName(StrictModel):
    """A class name that stands for several labels."""

    name: str
    labels: TupleOf[NonNegativeInt]


class ClassNames(StrictModel):
    """`classnames.txt` against the labels."""

    names: TupleOf[str]
    repeated: TupleOf[RepeatedName]
    empty: TupleOf[NonNegativeInt] = Field(description="Labels without a name")
    unused: TupleOf[NonNegativeInt] = Field(description="Labels that no image has, in either split")


class Templates(StrictModel):
    """`zeroshot_classification_templates.txt`."""

    templates: TupleOf[str]
    repeated: TupleOf[str]
    without_place: TupleOf[str] = Field(description="Those without a {c}")


class Inspection(StrictModel):
    """Everything found in a task folder."""

    task: str
    path: str
    splits: TupleOf[SplitFinding]
    shards: TupleOf[ShardFinding]
    manifest: bool = Field(description="Whether there is one, and the shards were compared with it")
    unreadable: Unreadable
    between_splits: Duplicates = Field(description="Test images that are training images too")
    within_splits: Duplicates
    classnames: ClassNames
    templates: Templates
    problems: TupleOf[str] = Field(description="What should be mended before training, a sentence each")
    warnings: TupleOf[str] = Field(description="What is worth knowing, a sentence each")
