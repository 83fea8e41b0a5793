"""What a run reports while it goes on, and what it leaves behind."""

from typing import Annotated, Literal

from pydantic import AfterValidator, AllowInfNan, Field, JsonValue, NonNegativeInt

from schemas.base import StrictModel, TupleOf
from schemas.experiment import HeldOut
from schemas.redaction import mask

# A text that others read: a presigned URL may be in it, whose signature is a password.
RedactedStr = Annotated[str, AfterValidator(mask)]
Row = TupleOf[float]  # accuracies in [0, 1], one a task, in the order of the tasks


class Metrics(StrictModel):
    """Figures of an accuracy matrix, as fractions; `None` where a single task leaves them undefined."""

    transfer: float | None = Field(description="Mean over tasks i ≥ 2 of the mean accuracy before stage i")
    avg: float = Field(
        description="Mean of the whole matrix; class-incremental: mean over stages of the accuracy on all classes seen"
    )
    last: float = Field(
        description="Mean of the last row; class-incremental: accuracy on all classes after the last stage"
    )
    forgetting: float | None = Field(description="Mean over earlier tasks of best minus final accuracy")
    backward_transfer: float | None = Field(
        None, description="Mean over earlier tasks of final accuracy minus that right after training"
    )
    forward_transfer: float | None = Field(
        None, description="Mean over later tasks of accuracy right before training minus that of the initial model"
    )


class StageResult(StrictModel):
    """One finished stage: what it cost and where it ended."""

    stage: int = Field(ge=1)
    task: str
    steps: NonNegativeInt
    images_seen: NonNegativeInt = Field(description="Task and reference images that went through the student")
    train_seconds: float
    images_per_second: float
    peak_memory_megabytes: float | None = Field(
        None, description="Of the main worker: allocated on its GPU, or its process's resident memory by then"
    )
    seconds_by_part: dict[str, float] = Field(
        default_factory=dict,
        description="Where the main worker's time went: data, student, teacher, averaging, checkpoint",
    )
    merges: NonNegativeInt = Field(description="Models in the weight ensemble, the stage's start included")
    losses: dict[str, float] = Field(description="Each named loss at the last step")
    warnings: TupleOf[str] = Field((), description="What looks like a failed stage, a sentence each")
    broken: TupleOf[RedactedStr] = Field((), description="Training samples that were skipped, a sentence each")
    identity: str = Field("", description="Content hash of all that the stage's training reads")
    shared: bool = Field(False, description="Trained by another run beside this one, for both: the cost is the other's")


class TaskName(StrictModel):
    """A task as a result names it."""

    name: str
    path: RedactedStr
    digest: str = Field(description="Content hash of the task's shards, class names and templates")
    test_images: NonNegativeInt
    broken_test_images: NonNegativeInt = Field(0, description="That were skipped; not among the test images")
    split_family: str = Field("", description="How train and test were told apart, as the task's manifest says")


class Result(StrictModel):
    """`result.json`: everything a comparison reads."""

    name: str
    method: str
    method_changes: dict[str, str | float | int | bool | None] = Field(
        description="What differs from the method's preset, by dotted path"
    )
    method_settings: dict[str, JsonValue] = Field(
        default_factory=dict, description="All settings of the method but its name and preset, by dotted path"
    )
    settings: dict[str, JsonValue] = Field(
        default_factory=dict, description="What training went by beside the method, by dotted path of the recipe"
    )
    model: RedactedStr = Field("", description="The initial model, as the recipe names it")
    model_digest: str = Field("", description="Content hash of its weights")
    seed: int
    fingerprint: str
    algorithm: str = Field("", description="Version of the algorithm that computed it; empty: older than versions")
    tasks: TupleOf[TaskName]
    held_out: HeldOut | None = Field(
        None, description="The part of the training images that was not trained on; judged_on says what the rows are of"
    )
    zero_shot: Row
    accuracy_matrix: TupleOf[Row] = Field(description="Row: after that stage; column: accuracy on that task")
    metrics: Metrics
    zero_shot_metrics: Metrics = Field(description="The same figures if every row were the zero-shot row")
    stages: TupleOf[StageResult]
    reference_texts: NonNegativeInt
    reference: str = Field("", description="Content hash of the reference set, where one was read")
    templates: Literal["all", "first"] = Field("all", description="Averaged into a class embedding, in evaluation")
    workers: int
    device: str
    warnings: TupleOf[str] = Field((), description="What looks like a failed stage, a sentence each")
    train_seconds: float
    evaluation_seconds: float
    versions: dict[str, str]


class Embedded(StrictModel):
    """What of the reference set is embedded by the teacher."""

    folder: str = Field(description="The store of the image features")
    images: NonNegativeInt
    texts: NonNegativeInt
    megabytes: float = Field(description="On disk, of the image features")


class Synced(StrictModel):
    """What a store got of a run, afterwards."""

    folder: str
    tracking_uri: str = Field(description="Without a password")
    entries: NonNegativeInt = Field(description="Of the journal, that were missing")
    status: str


class StepLosses(StrictModel):
    """One training step: `step` counts from 0."""

    step: NonNegativeInt
    learning_rate: float
    losses: dict[str, Annotated[float, AllowInfNan()]]
    gradient_norm: Annotated[float, AllowInfNan()] = Field(
        description="Over all trained parameters, before any clipping"
    )


class RunState(StrictModel):
    """`state.json`: how the last attempt at a run stands."""

    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = Field(description="As MLflow names it")
    reason: str = Field("", description="Of a failure, a sentence")
    time: int = Field(description="Since when, Unix time in milliseconds")
