"""MLflow: a run is a parent, each of its stages a child.

Names are laid out for MLflow's own compare view: the parent has one series a task, `accuracy/<task>` against the
number of stages trained (0 is the zero-shot row); a child has its curves against the step.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A dead server is noticed in seconds, not in MLflow's default of four minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from filelock import FileLock
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from orchestrate import report
from orchestrate.places import SQLITE, store_uri
from schemas.base import InputError
from schemas.experiment import Experiment
from schemas.results import Result, RowMeasured, StageStarted, StageTrained, StepsTaken
from schemas.secrets import mask

log = logging.getLogger(__name__)
logging.getLogger("mlflow").setLevel(logging.WARNING)

PARENT = "mlflow.parentRunId"
KEY = "zscl.key"
ROWS = "zscl.rows"
FAILURES = (MlflowException, SQLAlchemyError, OSError)
SILENCE_SECONDS = 30.0
METRICS_AT_ONCE = 1_000  # MLflow's limit for one call
# The kind of experiment whose page opens with charts for training instead of those for language models.
KIND = {"mlflow.experimentKind": "custom_model_development"}


class Tracker:
    """Records one run's progress. It must be able to start; a record that fails later is logged and passed over."""

    def __init__(self, experiment: Experiment, fingerprint: str, folder: Path) -> None:
        """Open the store and the parent run, which a resumed run finds again.

        Raises:
            InputError: the store cannot be reached.
        """
        self.uri = store_uri(experiment, folder)
        self.key = mask(f"{fingerprint} {folder}")
        self.children: dict[int, str] = {}
        self.silent_until = 0.0
        try:
            with _alone(self.uri):
                self.client = MlflowClient(tracking_uri=self.uri)
                self.experiment_id = self._experiment(experiment.tracking.experiment)
            self.parent = self._parent(experiment, fingerprint, folder)
        except (*FAILURES, ImportError) as error:
            shown = mask(" ".join(str(error).split()), self.uri)[:200]
            raise InputError(
                f"tracking.uri: found no reachable MLflow store at {mask(self.uri)}, expected a server "
                f"that answers or sqlite:///FILE ({shown})"
            ) from error
        self.rows = int(self.client.get_run(self.parent).data.tags.get(ROWS, 0))

    def __call__(self, progress: BaseModel) -> None:
        """Record one piece of progress; after a failure, nothing for a while, so that no backlog grows."""
        if time.monotonic() < self.silent_until:
            return
        try:
            match progress:
                case StageStarted():
                    self._start_stage(progress)
                case StepsTaken():
                    self._log(self.children.get(progress.stage), _curves(progress))
                case StageTrained():
                    seconds = Metric("train_seconds", progress.result.train_seconds, _now(), 0)
                    self._log(self.children.get(progress.result.stage), [seconds])
                case RowMeasured():
                    self._record_row(progress)
        except FAILURES as error:
            self.silent_until = time.monotonic() + SILENCE_SECONDS
            log.warning("MLflow did not take a record (%s); the run goes on", type(error).__name__)

    def finish(self, result: Result, folder: Path) -> None:
        """Record figures, matrix, recipe and pictures, and close the parent run."""
        zero_shot = result.zero_shot_metrics
        figures = result.metrics.model_dump() | {
            "zero_shot/transfer": zero_shot.transfer,
            "zero_shot/avg": zero_shot.avg,
        }
        now = _now()
        try:
            for stage, accuracies in enumerate([result.zero_shot, *result.accuracy_matrix]):
                row = dict(zip((task.name for task in result.tasks), accuracies, strict=True))
                self._record_row(RowMeasured(stage=stage, accuracy=row))  # those that were not taken at their time
            self._log(
                self.parent, [Metric(name, value, now, 0) for name, value in figures.items() if value is not None]
            )
            self.client.log_artifact(self.parent, str(folder / "experiment.yaml"))
            self.client.log_artifact(self.parent, str(folder / "result.json"))
            self.client.log_table(self.parent, report.matrix_columns(result), "accuracy_matrix.json")
            self.client.log_figure(self.parent, report.draw_matrix(result), "figures/accuracy_matrix.png")
            self.client.log_figure(self.parent, report.draw_accuracies(result), "figures/accuracy_by_stage.png")
            self.client.set_terminated(self.parent, "FINISHED")
        except FAILURES as error:
            log.warning("MLflow did not take the result (%s); it is in %s", type(error).__name__, folder)

    def close(self, status: str) -> None:
        """Mark the parent and the open stage as FAILED or KILLED."""
        try:
            for run in (*self.children.values(), self.parent):
                if self.client.get_run(run).info.status == "RUNNING":
                    self.client.set_terminated(run, status)
        except FAILURES as error:
            log.warning("MLflow did not take the status %s (%s)", status, type(error).__name__)

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Beside an SQLite store lie its artefacts; a server has a place of its own.
        local = self.uri.startswith(SQLITE)
        place = str(Path(self.uri.removeprefix(SQLITE)).parent / "mlflow-artifacts") if local else None
        try:
            return str(self.client.create_experiment(name, artifact_location=place, tags=KIND))
        except MlflowException:
            made = self.client.get_experiment_by_name(name)  # by another run, in between
            if made is None:
                raise
            return str(made.experiment_id)

    def _parent(self, experiment: Experiment, fingerprint: str, folder: Path) -> str:
        found = self._find(self.key)
        if found:
            self.client.update_run(found, status="RUNNING")
            return found
        tags = {
            KEY: self.key,
            "zscl.level": "sequence",
            "zscl.method": experiment.method.name,
            "zscl.seed": str(experiment.seed),
            "zscl.fingerprint": fingerprint,
            "zscl.order": ", ".join(task.name for task in experiment.tasks),
            "zscl.folder": mask(str(folder)),
        }
        run = self.client.create_run(self.experiment_id, run_name=folder.name, tags=tags).info.run_id
        what = experiment.model_dump(mode="json", exclude={"compute", "tracking", "tasks"})
        params = [Param(name, mask(str(value))[:6000]) for name, value in _flat(what)]
        params.append(Param("tasks", tags["zscl.order"][:6000]))
        self.client.log_batch(run, params=params)
        return str(run)

    def _find(self, key: str) -> str | None:
        quoted = key.replace("'", "\\'")
        runs = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{quoted}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _stage_key(self, stage: int) -> str:
        return f"{self.key} stage {stage}"

    def _start_stage(self, started: StageStarted) -> None:
        key = self._stage_key(started.stage)
        interrupted = self._find(key)
        if interrupted:  # it is trained again from its start: one curve, not two
            self.client.delete_run(interrupted)
        tags = {KEY: key, PARENT: self.parent, "zscl.level": "stage", "zscl.stage": str(started.stage)}
        name = f"{started.stage}-{started.task}"
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        self.children[started.stage] = run.info.run_id

    def _record_row(self, row: RowMeasured) -> None:
        if row.stage < self.rows:  # recorded before an interruption
            return
        now = _now()
        cells = [Metric(f"accuracy/{task}", value, now, row.stage) for task, value in row.accuracy.items()]
        mean = sum(row.accuracy.values()) / len(row.accuracy)
        self._log(self.parent, [*cells, Metric("accuracy_mean", mean, now, row.stage)])
        self.rows = row.stage + 1
        self.client.set_tag(self.parent, ROWS, str(self.rows))
        # A stage trained before an interruption has its run, but not in this process.
        child = self.children.pop(row.stage, None) or self._find(self._stage_key(row.stage))
        if child:
            self._log(child, cells)
            self.client.set_terminated(child, "FINISHED")

    def _log(self, run: str | None, metrics: list[Metric]) -> None:
        if run is None:  # a stage whose start was not recorded has no run
            return
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(run, metrics=metrics[start : start + METRICS_AT_ONCE])


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Let one process at a time open an SQLite store: two that create it at once break it."""
    if not uri.startswith(SQLITE):
        yield
        return
    file = Path(uri.removeprefix(SQLITE))
    if file.is_dir():
        raise OSError(f"{file} is a folder")
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield


def _curves(taken: StepsTaken) -> list[Metric]:
    now = _now()
    curves = []
    for step in taken.steps:
        curves.append(Metric("learning_rate", step.learning_rate, now, step.step))
        curves += [Metric(f"loss/{name}", value, now, step.step) for name, value in step.losses.items()]
    curves.append(Metric("images_per_second", taken.images_per_second, now, taken.steps[-1].step))
    return curves


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _now() -> int:
    return int(time.time() * 1000)
