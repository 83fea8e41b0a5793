"""Fake runs for tests of MLflow tracking, and functions that read their records from a store."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from orchestrate.lifecycle.paths import sqlite_uri
from orchestrate.lifecycle.run_status import write_state
from orchestrate.tracking.mlflow_client import LEVEL, PARENT
from orchestrate.tracking.uploader import JournalUploader
from schemas.events import (
    CheckpointWritten,
    Note,
    RowMeasured,
    RunStarted,
    StageStarted,
    StageTrained,
    StepsTaken,
)
from schemas.experiment import Experiment
from schemas.results import Metrics, Result, StageResult, StepLosses, TaskSummary
from zscl.sequence.journal import Journal
from zscl.sequence.layout import JOURNAL

STAGES = ("first", "second")
BEGINNING = (RunStarted(fingerprint="abc"), RowMeasured(stage=0, accuracy={"first": 0.5, "second": 0.25}))


class FakeRun:
    """A run that writes its journal, state and result without training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.messages = folder, list[str]()
        self.journal = Journal(folder / JOURNAL)

    def emit(self, *events: Any) -> None:
        for event in events:
            self.journal(event)

    def start_uploader(self, experiment: Experiment, fingerprint: str = "abc") -> JournalUploader:
        write_state(self.folder, "RUNNING")
        return JournalUploader(experiment, fingerprint, self.folder, self.messages.append)

    def finish(self) -> None:
        stages = tuple(trained(stage).result for stage in (1, 2))
        figures = Metrics(transfer=0.5, avg=0.6, last=0.7, forgetting=0.1)
        result = Result(
            name="tiny", method="zscl", method_changes={}, seed=0, fingerprint="abc",
            tasks=tuple(TaskSummary(name=name, path=name, digest=name, test_images=4) for name in STAGES),
            zero_shot=(0.5, 0.25), accuracy_matrix=((0.6, 0.3), (0.7, 0.35)), metrics=figures,
            zero_shot_metrics=figures, stages=stages, reference_texts=14, workers=1, device="cpu",
            warnings=("stage 1 looks bad",), train_seconds=2.0, evaluation_seconds=1.0, versions={},
        )  # fmt: skip
        (self.folder / "result.json").write_text(result.model_dump_json())
        write_state(self.folder, "FINISHED")


def steps(stage: int, *numbers: int) -> StepsTaken:
    taken = tuple(
        StepLosses(step=step, learning_rate=0.1, losses={"classification": 1 / (step + 1)}, gradient_norm=step + 0.5)
        for step in numbers
    )
    return StepsTaken(stage=stage, task=STAGES[stage - 1], steps=taken, images_per_second=10.0)


def started(stage: int) -> StageStarted:
    return StageStarted(stage=stage, task=STAGES[stage - 1], steps=4)


def trained(stage: int) -> StageTrained:
    result = StageResult(
        stage=stage, task=STAGES[stage - 1], steps=4, images_seen=44, train_seconds=1.5, images_per_second=10.0,
        merges=1, losses={},
    )  # fmt: skip
    return StageTrained(result=result)


def row(stage: int) -> RowMeasured:
    return RowMeasured(stage=stage, accuracy={"first": 0.5 + stage / 10, "second": 0.25 + stage / 20})


def stage_events(stage: int) -> tuple[Any, ...]:
    return (
        started(stage), steps(stage, 0, 1), CheckpointWritten(stage=stage, steps=2), Note(text="by the way"),
        steps(stage, 2), steps(stage, 3), trained(stage), row(stage),
    )  # fmt: skip


def read_store(uri: str) -> dict[str, dict[str, Any]]:
    """Return all records of a store as a mapping from run names, with the full history of every metric."""
    client = MlflowClient(uri)
    records = {}
    for run in client.search_runs([client.get_experiment_by_name("zscl").experiment_id]):
        is_stage = PARENT in run.data.tags
        assert run.info.run_name not in records
        records[run.info.run_name] = {
            "status": run.info.status,
            "ended": run.info.end_time,
            "started": run.info.start_time if is_stage else None,  # the parent may be created before the journal
            "params": run.data.params,
            "tags": {name: value for name, value in run.data.tags.items() if name != PARENT},
            "histories": {
                name: [
                    (point.step, point.value, point.timestamp)
                    for point in client.get_metric_history(run.info.run_id, name)
                ]
                for name in run.data.metrics
            },
            "artefacts": sorted(item.path for item in client.list_artifacts(run.info.run_id)),
        }
    return records


def curve(run: dict[str, Any], name: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value, _ in run["histories"][name]]


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sequence_run_ids(store: Path) -> list[str]:
    """Return the IDs of the parent runs in a store."""
    client = MlflowClient(sqlite_uri(store))
    experiments = [client.get_experiment_by_name("zscl").experiment_id]
    return [run.info.run_id for run in client.search_runs(experiments, f"tags.`{LEVEL}` = 'sequence'")]


def record_killed_run(folder: Path, experiment: Experiment, *events: Any) -> str:
    """Upload a fake run that emits some events and is killed, and return its MLflow run ID."""
    run = FakeRun(folder)
    uploader = run.start_uploader(experiment)
    run.emit(*events)
    write_state(folder, "KILLED", "enough")
    assert uploader.end()
    return uploader.run_id
