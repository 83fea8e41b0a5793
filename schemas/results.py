"""Results of a run: accuracy matrix, metrics, stages, losses and status, as stored in its folder."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field, JsonValue, NonNegativeInt

from schemas.base import StrictModel, TupleOf
from schemas.experiment import HeldOut
from schemas.redaction import mask

# Secrets are masked on validation: texts such as paths may contain presigned URLs, whose signatures are secrets.
RedactedStr = Annotated[str, AfterValidator(mask)]
AccuracyRow = TupleOf[float]  # accuracies in [0, 1], one per task, in the order of the tasks


class Metrics(StrictModel):
    """Metrics of an accuracy matrix, as fractions; `None` if undefined for a single task."""

    transfer: float | None = Field(description="Mean over tasks i ≥ 2 of the mean accuracy before stage i")
    avg: float = Field(
        description="Mean of the whole matrix; class-incremental: mean over stages of the accuracy on all classes seen"
    )
    last: float = Field(
        description="Mean of the last row; class-incremental: accuracy on all classes after the last stage"
    )
    forgetting: float | None = Field(description="Mean over earlier tasks of best minus final accuracy")
    backward_transfer: float | None = Field(
        None, description="Mean over earlier tasks of final accuracy minus accuracy right after training"
    )
    forward_transfer: float | None = Field(
        None, description="Mean over later tasks of accuracy right before training minus the initial model's accuracy"
    )


class StageResult(StrictModel):
    """One finished stage: its time and memory, final losses and warnings."""

    stage: int = Field(ge=1)
    task: str
    steps: NonNegativeInt
    images_seen: NonNegativeInt = Field(description="Task and reference images that the student processed")
    train_seconds: float
    images_per_second: float
    peak_memory_megabytes: float | None = Field(
        None, description="Peak memory of the main worker: allocated on its GPU, or resident memory of its process"
    )
    seconds_by_part: dict[str, float] = Field(
        default_factory=dict,
        description="Time of the main worker by part: data, student, teacher, averaging, checkpoint",
    )
    merges: NonNegativeInt = Field(description="Models in the weight ensemble, including the stage's start")
    losses: dict[str, float] = Field(description="Each named loss at the last step")
    warnings: TupleOf[str] = Field((), description="Signs of a failed stage, one message each")
    broken: TupleOf[RedactedStr] = Field((), description="Training samples that were skipped, one message each")
    identity: str = Field("", description="Content hash of everything that the stage's training reads")
    shared: bool = Field(False, description="Whether another run trained the stage; the cost is the cost of that run")


class TaskSummary(StrictModel):
    """A task in a run's result: its name, path, content hash and number of test images."""

    name: str
    path: RedactedStr
    digest: str = Field(description="Content hash of the task's shards, class names and templates")
    test_images: NonNegativeInt
    broken_test_images: NonNegativeInt = Field(
        0, description="Test images that were skipped; not counted in test_images"
    )
    split_family: str = Field("", description="How the data was split into train and test, from the task's manifest")


def _rename_further_losses(settings: Any) -> Any:
    """Rename the keys of `further_losses`, the former name of `custom_losses`, in results of earlier versions."""
    if not isinstance(settings, dict):
        return settings
    former = "further_losses."
    return {
        key.replace(former, "custom_losses.") if key.startswith(former) else key: value
        for key, value in settings.items()
    }


_CUSTOM_LOSSES = BeforeValidator(_rename_further_losses)


class Result(StrictModel):
    """The content of `result.json`: the results of a run, and all information that a comparison of runs needs."""

    name: str
    method: str
    method_changes: Annotated[dict[str, str | float | int | bool | None], _CUSTOM_LOSSES] = Field(
        description="Settings that differ from the method's preset, by dotted path"
    )
    method_settings: Annotated[dict[str, JsonValue], _CUSTOM_LOSSES] = Field(
        default_factory=dict, description="All settings of the method except its name and preset, by dotted path"
    )
    settings: dict[str, JsonValue] = Field(
        default_factory=dict, description="Training settings other than the method's, by dotted recipe field"
    )
    model: RedactedStr = Field("", description="The initial model, as named in the recipe")
    model_digest: str = Field("", description="Content hash of the initial model's weights")
    seed: int
    fingerprint: str
    algorithm: str = Field(
        "", description="Version of the algorithm; empty in results that are older than these versions"
    )
    tasks: TupleOf[TaskSummary]
    held_out: HeldOut | None = Field(
        None,
        description="The held-out part of the training images; judged_on is the set of images that the rows are "
        "measured on",
    )
    zero_shot: AccuracyRow
    accuracy_matrix: TupleOf[AccuracyRow] = Field(
        description="Rows: stages; columns: accuracy on each task after the stage"
    )
    metrics: Metrics
    zero_shot_metrics: Metrics = Field(description="The same metrics if every row of the matrix is the zero-shot row")
    stages: TupleOf[StageResult]
    reference_texts: NonNegativeInt
    reference: str = Field("", description="Content hash of the reference set, if one was read")
    templates: Literal["all", "first"] = Field(
        "all", description="Which templates are averaged into a class embedding in evaluation"
    )
    workers: int
    device: str
    warnings: TupleOf[str] = Field((), description="Signs of a failed stage, one message each")
    train_seconds: float
    evaluation_seconds: float
    versions: dict[str, str]


class EmbeddingReport(StrictModel):
    """Location and size of the teacher's cached features of the reference set."""

    folder: str = Field(description="Folder of the cached image features")
    images: NonNegativeInt
    texts: NonNegativeInt
    megabytes: float = Field(description="Size of the image features on disk")


class SyncReport(StrictModel):
    """The outcome of `zscl sync`: what was sent to the tracking store."""

    folder: str
    tracking_uri: str = Field(description="URI of the tracking store, without password")
    entries: NonNegativeInt = Field(description="Journal entries that were missing in the store")
    status: str


class StepLosses(StrictModel):
    """The losses of one training step; `step` counts from 0."""

    step: NonNegativeInt
    learning_rate: float
    losses: dict[str, Annotated[float, AllowInfNan()]]
    gradient_norm: Annotated[float, AllowInfNan()] = Field(
        description="Norm over all trained parameters, before clipping"
    )


class RunState(StrictModel):
    """The content of `state.json`: the status of the last attempt at a run."""

    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = Field(description="Status in MLflow's terms")
    reason: str = Field("", description="Reason of a failure, one sentence")
    time: int = Field(description="Time of the last change, Unix time in milliseconds")
