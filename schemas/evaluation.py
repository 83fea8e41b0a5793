"""What a model is worth under several protocols, beyond one cell of the accuracy matrix."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from schemas.base import StrictModel, TupleOf
from schemas.results import Metrics, RedactedStr

Protocol = Literal["task-aware", "task-agnostic"]
PROTOCOLS: tuple[Protocol, ...] = ("task-aware", "task-agnostic")


class ConfusionCount(StrictModel):
    """Test images of one class that the model took for another, or for their own."""

    true: str
    predicted: str
    images: PositiveInt


class Bin(StrictModel):
    """Images whose top prediction has a confidence in one of equal intervals of [0, 1]."""

    images: NonNegativeInt
    confidence: float = Field(description="Mean; 0 without images")
    accuracy: float


class TaskEvaluation(StrictModel):
    """One model on one task under one protocol; shares of 1."""

    task: str
    protocol: Protocol
    images: PositiveInt
    classes: PositiveInt = Field(description="That are told apart")
    top1: float
    top5: float | None = Field(description="None where no more than 5 classes are told apart")
    mean_per_class: float = Field(description="Mean over the task's classes of the top-1 accuracy on their images")
    calibration_error: float = Field(description="Expected |confidence − accuracy|, over equal intervals of confidence")
    per_class: dict[str, float] = Field(description="Top-1 accuracy on each class that has test images")
    bins: TupleOf[Bin]
    confused: TupleOf[ConfusionCount] = Field(description="Every pair with images, the right predictions among them")


class ModelEvaluation(StrictModel):
    """One model on all tasks and suites."""

    model: RedactedStr
    stage: NonNegativeInt | None = Field(None, description="Of a run; 0 is the initial model")
    digest: str = Field(description="Content hash of the weights")
    judged: TupleOf[TaskEvaluation]


class Evaluation(StrictModel):
    """`evaluation.json`."""

    tasks: TupleOf[str] = Field(description="Whose classes share the label space of the task-agnostic protocol")
    suites: TupleOf[str] = Field(description="Judged beside them, each among its own classes")
    templates: Literal["all", "first"]
    held_out: bool = Field(
        description="The tasks are judged on held-out training images, as the run was; suites always on test images"
    )
    models: TupleOf[ModelEvaluation]
    figures: dict[Protocol, Metrics] = Field(
        description="Of the accuracy matrix under each protocol, where all stages of a run were judged on its tasks"
    )
    versions: dict[str, str]
    warnings: TupleOf[str] = Field((), description="Prompts that are cut, and classes that a model cannot tell apart")


class TriedAverage(StrictModel):
    """What a stage would have handed on with another average, or merged with an anchor; accuracies are shares of 1."""

    kind: Literal["none", "mean", "exponential"]
    every: PositiveInt | None = None
    decay: float | None = None
    share: float = Field(0.0, description="Of the anchor, in what is handed on")
    merges: NonNegativeInt = Field(description="Models in the average")
    own: bool = Field(description="Whether this is what the run's method handed on")
    accuracy: dict[str, float] = Field(description="On each task")
    trained: float = Field(description="On the stage's task")
    earlier: float | None = Field(description="Mean over the tasks before it")
    later: float | None = Field(description="Mean over the tasks behind it: what zero-shot ability is left")


class TriedAverages(StrictModel):
    """`averages.json`."""

    stage: PositiveInt
    task: str
    snapshots_every: PositiveInt
    anchor: Literal["stage_start", "initial"]
    start: dict[str, float] = Field(description="The stage's start, on each task")
    tried: TupleOf[TriedAverage]
