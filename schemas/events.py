"""Events of a run, as the journal holds them."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from schemas.base import StrictModel, TupleOf
from schemas.results import RedactedStr, StageResult, StepLosses


class StageStarted(StrictModel):
    """Stage `stage` (from 1) begins."""

    event: Literal["stage_started"] = "stage_started"
    stage: int
    task: str
    steps: int


class StepsTaken(StrictModel):
    """Steps since the last such report, on all workers together."""

    event: Literal["steps_taken"] = "steps_taken"
    stage: int
    task: str
    steps: TupleOf[StepLosses]
    images_per_second: float


class WorkerUse(StrictModel):
    """What one worker has used of late."""

    images_per_second: float = Field(description="Its own, task and distilled images")
    loader_wait_share: float = Field(description="Of its time, that it waited for images to be read and decoded")
    cpu_cores: float = Field(description="Cores' worth of CPU time, its loader processes not among it")
    memory_megabytes: float = Field(description="Resident")
    gpu_memory_megabytes: float | None = Field(None, description="That torch holds of its GPU")


class WorkersUsed(StrictModel):
    """What every worker has used since the last such report, in the order of their ranks."""

    event: Literal["workers_used"] = "workers_used"
    stage: int
    step: int
    workers: TupleOf[WorkerUse]


class StageTrained(StrictModel):
    """The stage's model is on disk."""

    event: Literal["stage_trained"] = "stage_trained"
    result: StageResult


class TaskEvaluated(StrictModel):
    """One cell of the matrix; stage 0 is the zero-shot row."""

    event: Literal["task_evaluated"] = "task_evaluated"
    stage: NonNegativeInt
    task: str
    accuracy: float
    images: int


class RowMeasured(StrictModel):
    """A row of the matrix is complete and on disk; stage 0 is the zero-shot row."""

    event: Literal["row_measured"] = "row_measured"
    stage: NonNegativeInt
    accuracy: dict[str, float]


class ImagesEmbedded(StrictModel):
    """The teacher's features of the distilled images, computed ahead of training."""

    event: Literal["images_embedded"] = "images_embedded"
    done: NonNegativeInt
    total: NonNegativeInt


class RunStarted(StrictModel):
    """A run begins, or goes on."""

    event: Literal["run_started"] = "run_started"
    fingerprint: str


class CheckpointWritten(StrictModel):
    """The stage can go on from behind so many steps."""

    event: Literal["checkpoint_written"] = "checkpoint_written"
    stage: int
    steps: NonNegativeInt


class Note(StrictModel):
    """Something worth a line in the log."""

    event: Literal["note"] = "note"
    text: RedactedStr


Progress = Annotated[
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
    """A line of `journal.jsonl`."""

    time: int = Field(description="Unix time, in milliseconds")
    progress: Progress
