"""Reports of `zscl evaluate` and `zscl average`: accuracy, calibration and confusions by model, task and protocol."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from schemas.base import StrictModel, TupleOf
from schemas.results import Metrics, RedactedStr

Protocol = Literal["task-aware", "task-agnostic"]
PROTOCOLS: tuple[Protocol, ...] = ("task-aware", "task-agnostic")


class ConfusionCount(StrictModel):
    """One cell of the confusion matrix: the number of images of class `true` that were classified as `predicted`."""

    true: str
    predicted: str
    images: PositiveInt


class ConfidenceBin(StrictModel):
    """One bin of the expected calibration error: the images whose confidence is in one of equal intervals of [0, 1]."""

    images: NonNegativeInt
    confidence: float = Field(description="Mean confidence; 0 without images")
    accuracy: float


class TaskEvaluation(StrictModel):
    """Evaluation of one model on one task under one protocol. Accuracies are fractions."""

    task: str
    protocol: Protocol
    images: PositiveInt
    classes: PositiveInt = Field(description="Number of candidate classes")
    top1: float
    top5: float | None = Field(description="None if there are at most 5 candidate classes")
    mean_per_class: float = Field(description="Mean over the task's classes of the top-1 accuracy on their images")
    calibration_error: float = Field(
        description="Expected calibration error: mean |confidence − accuracy| over equal bins of confidence"
    )
    per_class: dict[str, float] = Field(description="Top-1 accuracy on each class that has test images")
    bins: TupleOf[ConfidenceBin]
    confused: TupleOf[ConfusionCount] = Field(
        description="All non-empty cells of the confusion matrix, including correct predictions"
    )


class ModelEvaluation(StrictModel):
    """Evaluation of one model on all tasks and suites (additional tasks, each evaluated among its own classes)."""

    model: RedactedStr
    stage: NonNegativeInt | None = Field(None, description="Stage of a run; 0 is the initial model")
    digest: str = Field(description="Content hash of the weights")
    judged: TupleOf[TaskEvaluation]


class EvaluationReport(StrictModel):
    """The content of `evaluation.json`, which `zscl evaluate` writes."""

    tasks: TupleOf[str] = Field(description="Tasks whose classes form the label space of the task-agnostic protocol")
    suites: TupleOf[str] = Field(description="Additional tasks, each evaluated among its own classes")
    templates: Literal["all", "first"]
    held_out: bool = Field(
        description="Whether the tasks were evaluated on held-out training images; suites always use test images"
    )
    models: TupleOf[ModelEvaluation]
    figures: dict[Protocol, Metrics] = Field(
        description="Metrics of the accuracy matrix by protocol, if all stages of a run were evaluated on its tasks"
    )
    versions: dict[str, str]
    warnings: TupleOf[str] = Field((), description="Truncated prompts, and classes that a model cannot distinguish")


class ReplayedAverage(StrictModel):
    """Accuracy of a stage's model after its weight averaging is recomputed from snapshots.

    The average is recomputed with one averaging setting, and the result is interpolated with the anchor model by one
    weight. Accuracies are fractions.
    """

    kind: Literal["none", "mean", "exponential"]
    every: PositiveInt | None = None
    decay: float | None = None
    share: float = Field(0.0, description="Interpolation weight of the anchor model")
    merges: NonNegativeInt = Field(description="Number of models in the average")
    own: bool = Field(description="Whether this is the setting of the run's own method")
    accuracy: dict[str, float] = Field(description="Accuracy by task")
    trained: float = Field(description="Accuracy on the stage's task")
    earlier: float | None = Field(description="Mean accuracy on the tasks before the stage's task")
    later: float | None = Field(description="Mean zero-shot accuracy on the tasks after the stage's task")


class ReplayedAverages(StrictModel):
    """The content of `averages.json`, which `zscl average` writes: the recomputed averages of one stage."""

    stage: PositiveInt
    task: str
    snapshots_every: PositiveInt
    anchor: Literal["stage_start", "initial"]
    start: dict[str, float] = Field(description="Accuracy by task of the model at the stage's start")
    tried: TupleOf[ReplayedAverage]
