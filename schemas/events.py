"""Events of a run, as recorded in its file `journal.jsonl` and sent to the driver process."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from schemas.base import StrictModel, TupleOf
from schemas.results import RedactedStr, StageResult, StepLosses


class StageStarted(StrictModel):
    """A stage starts. Stages are counted from 1."""

    event: Literal["stage_started"] = "stage_started"
    stage: int
    task: str
    steps: int


class StepsTaken(StrictModel):
    """The training steps since the previous `StepsTaken` event. Losses and throughput cover all workers."""

    event: Literal["steps_taken"] = "steps_taken"
    stage: int
    task: str
    steps: TupleOf[StepLosses]
    images_per_second: float


class WorkerUse(StrictModel):
    """The resource usage of one worker since the previous `WorkersUsed` event."""

    images_per_second: float = Field(description="Throughput of this worker, task and distillation images")
    loader_wait_share: float = Field(description="Fraction of the time spent waiting for images to be read and decoded")
    cpu_cores: float = Field(description="Average number of busy CPU cores, without loader processes")
    memory_megabytes: float = Field(description="Resident memory")
    gpu_memory_megabytes: float | None = Field(None, description="GPU memory that PyTorch has reserved")


class WorkersUsed(StrictModel):
    """The resource usage of every worker since the previous `WorkersUsed` event, in the order of the ranks."""

    event: Literal["workers_used"] = "workers_used"
    stage: int
    step: int
    workers: TupleOf[WorkerUse]


class StageTrained(StrictModel):
    """A stage's training has finished, and its model is on disk."""

    event: Literal["stage_trained"] = "stage_trained"
    result: StageResult


class TaskEvaluated(StrictModel):
    """The accuracy of one stage's model on one task was measured; stage 0 is the initial (zero-shot) model."""

    event: Literal["task_evaluated"] = "task_evaluated"
    stage: NonNegativeInt
    task: str
    accuracy: float
    images: int


class RowMeasured(StrictModel):
    """The accuracy of one stage's model on all tasks is on disk; stage 0 is the initial (zero-shot) model."""

    event: Literal["row_measured"] = "row_measured"
    stage: NonNegativeInt
    accuracy: dict[str, float]


class ImagesEmbedded(StrictModel):
    """Progress of computing the teacher's features of the distillation images before training."""

    event: Literal["images_embedded"] = "images_embedded"
    done: NonNegativeInt
    total: NonNegativeInt


class RunStarted(StrictModel):
    """A run starts or resumes."""

    event: Literal["run_started"] = "run_started"
    fingerprint: str


class CheckpointWritten(StrictModel):
    """A checkpoint was written. The stage can resume from it, after `steps` finished steps."""

    event: Literal["checkpoint_written"] = "checkpoint_written"
    stage: int
    steps: NonNegativeInt


class Note(StrictModel):
    """A message for the log."""

    event: Literal["note"] = "note"
    text: RedactedStr


RunEvent = Annotated[
    RunStarted
    | StageStarted
    | StepsTaken
    | WorkersUsed
    | CheckpointWritten
    | StageTrained
    | TaskEvaluated
    | RowMeasured
    | ImagesEmbedded
    | Note,
    Field(discriminator="event"),
]


class JournalEntry(StrictModel):
    """One line of `journal.jsonl`."""

    time: int = Field(description="Unix time, in milliseconds")
    progress: RunEvent
