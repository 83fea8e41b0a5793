"""MLflow: a run is a parent, each of its stages a child.

Names are laid out for MLflow's own compare view: the parent has one series a task, `accuracy/<task>` against the
number of stages trained (0 is the zero-shot row); a child has its curves against the step.

Everything can be sent twice and is there once: runs are found again, and a metric that has the time of its journal
entry is, for the stores of MLflow, the one they have.
"""

import json
import logging
import re
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag

from orchestrate.reports.charts import draw_accuracies, draw_matrix
from orchestrate.reports.results import matrix_columns
from orchestrate.tracking.mlflow_client import (
    ARTIFACTS,
    FINGERPRINT,
    FOLDER,
    LEVEL,
    LONGEST_NAME,
    LONGEST_VALUE,
    PARENT,
    REASON,
    TAKEN,
    clear_reason,
    find_recorded,
    flatten,
    log_metrics,
    log_table,
    open_store,
    provenance,
    runs_of,
    valid_name,
)
from orchestrate.tracking.store_errors import artifact_error, reason_of
from schemas.errors import InputError, command
from schemas.events import JournalEntry, RowMeasured, StageStarted, StageTrained, StepsTaken, WorkersUsed
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import Result, RunState, StageResult
from zscl.sequence.journal import begun_in
from zscl.sequence.layout import model_folder
from zscl.sequence.resolve import resolve_tasks

log = logging.getLogger(__name__)

STAGE = "zscl.stage"
LONGEST_DIGEST = 36


class RunRecorder:
    """One run in a store. Every method raises one of `store_errors.FAILURES` where the store does not answer."""

    def __init__(
        self,
        experiment: Experiment,
        fingerprint: str,
        folder: Path,
        uri: str,
        begun: int | None,
        search: str | None = None,
    ) -> None:
        """Find the run in the store, or make it.

        Args:
            experiment: what is run.
            fingerprint: of it.
            folder: the run's, absolute.
            uri: of the store.
            begun: when the run's journal begins, if there is one; it tells a run from an earlier one of the same
                experiment, whose folder is gone.
            search: the run, in the store, of the search that this one is a trial of.
        """
        self.begun, self.search = begun, search
        self.experiment, self.folder = experiment, folder
        self.client, self.experiment_id = open_store(uri, experiment.tracking.experiment)
        found = self._find(fingerprint) or self._make(experiment, fingerprint, folder)
        self.parent = str(found.info.run_id)
        self.status = str(found.info.status)
        self.complete = self.status == "FINISHED" and ARTIFACTS not in found.data.tags
        self._uri, self._artifacts = uri, str(found.info.artifact_uri)
        self._artifacts_failed = False
        self.taken = int(found.data.tags.get(TAKEN, "0").partition(" ")[0])
        if found.data.tags.get(FOLDER) != mask(str(folder)):  # moved since
            self.client.set_tag(self.parent, FOLDER, mask(str(folder)))
        self._children: dict[int, str] = {}
        if not found.data.params:
            what = experiment.model_dump(mode="json", exclude={"compute", "tracking", "tasks"})
            what["optimisation"]["warmup_steps"] = experiment.warmup_steps
            params = [Param(valid_name(name), mask(str(value))[:LONGEST_VALUE]) for name, value in flatten(what)]
            self.client.log_batch(self.parent, params=params)

    def resume(self) -> None:
        """Say that the run is under way."""
        self.client.update_run(self.parent, status="RUNNING")
        clear_reason(self.client, self.parent)

    def send(self, entries: Sequence[JournalEntry]) -> None:
        """Send the entries behind those that were taken, and note how many that makes."""
        for stage, together in groupby(entries, key=_stage_of_steps):
            if stage is None:
                for entry in together:
                    self._send_event(entry)
            else:  # neighbouring steps of a stage, in few calls
                curves = [metric for entry in together for metric in _curves(entry)]
                log_metrics(self.client, self._child(stage, curves[0].timestamp), curves)
        self.begun = self.begun or entries[0].time
        self.client.set_tag(self.parent, TAKEN, f"{self.taken + len(entries)} since {self.begun}")
        self.taken += len(entries)

    def finish(self, result: Result, folder: Path, measured: int, ended: int, files: bool = True) -> None:
        """Record figures, matrix, recipe and pictures, and close the parent.

        Args:
            result: of the run.
            folder: of the run.
            measured: the time that the figures get, the same whenever they are sent.
            ended: when the run was finished.
            files: Also send what belongs into the artefact store.

        Raises:
            ArtifactError: All but the files is recorded.
        """
        zero_shot = result.zero_shot_metrics
        figures = result.metrics.model_dump() | {
            "zero_shot/transfer": zero_shot.transfer,
            "zero_shot/avg": zero_shot.avg,
        }
        metrics = [Metric(name, value, measured, 0) for name, value in figures.items() if value is not None]
        if not result.stages:  # nothing was trained, nor measured again; the rows are there for comparisons
            names = [task.name for task in result.tasks]
            for stage, cells in enumerate(result.accuracy_matrix, start=1):
                metrics += _row(dict(zip(names, cells, strict=True)), measured, stage)
        log_metrics(self.client, self.parent, metrics)
        self._log_data(result)
        if result.warnings:
            self.client.set_tag(self.parent, "zscl.warnings", "\n".join(result.warnings)[:LONGEST_VALUE])
        clear_reason(self.client, self.parent)
        # The status comes before the files: their store may be another one, which does not answer.
        sync = command("zscl", "sync", folder)
        self.client.set_tag(self.parent, ARTIFACTS, f"not sent yet; this command sends them: {sync}"[:LONGEST_VALUE])
        self.client.set_terminated(self.parent, "FINISHED", ended)
        if not files:
            return
        try:
            self._log_files(result, folder)
        except Exception as error:  # whatever the library of an artefact store raises
            told = artifact_error(self._uri, self._artifacts, error)
            self.client.set_tag(self.parent, ARTIFACTS, str(told)[:LONGEST_VALUE])
            raise told from error
        self.client.delete_tag(self.parent, ARTIFACTS)
        self.complete = True

    def _log_files(self, result: Result, folder: Path) -> None:
        """Record matrix, recipe, pictures, and the models that the store would not take before."""
        self.client.log_artifact(self.parent, str(folder / "experiment.yaml"))
        self.client.log_artifact(self.parent, str(folder / "result.json"))
        log_table(self.client, self.parent, matrix_columns(result), "accuracy_matrix.json")
        self.client.log_figure(self.parent, draw_matrix(result), "figures/accuracy_matrix.png")
        self.client.log_figure(self.parent, draw_accuracies(result), "figures/accuracy_by_stage.png")
        for trained in result.stages:
            if child := self._find_child(trained.stage):
                self._log_model(child.info.run_id, trained)

    def _log_data(self, result: Result) -> None:
        """Name the data, with digests and split families, where MLflow shows a run's datasets."""
        if self.client.get_run(self.parent).inputs.dataset_inputs:
            return
        context = [InputTag("mlflow.data.context", "training and evaluation")]
        found = [
            DatasetInput(
                Dataset(
                    name=task.name,
                    digest=task.digest[:LONGEST_DIGEST],
                    source_type="local",
                    source=json.dumps({"uri": task.path}),
                    profile=json.dumps({"split_family": task.split_family, "test_images": task.test_images}),
                ),
                context,
            )
            for task in result.tasks
        ]
        if result.reference:
            digest, texts = result.reference[:LONGEST_DIGEST], json.dumps({"texts": result.reference_texts})
            reference = Dataset("reference", digest, "local", json.dumps({"uri": ""}), profile=texts)
            found.append(DatasetInput(reference, [InputTag("mlflow.data.context", "reference")]))
        self.client.log_inputs(self.parent, datasets=found)

    def close(self, state: RunState) -> None:
        """Mark the parent and the open stage as FAILED or KILLED, and say why."""
        query = f"tags.`{PARENT}` = '{self.parent}' and attributes.status = 'RUNNING'"
        for stage in self.client.search_runs([self.experiment_id], query):
            self.client.set_terminated(stage.info.run_id, state.status, state.time)
        self.client.set_tag(self.parent, REASON, state.reason[:LONGEST_VALUE])
        self.client.set_terminated(self.parent, state.status, state.time)

    def _find(self, fingerprint: str) -> Run | None:
        runs = runs_of(self.client, [self.experiment_id], fingerprint, [self._level])
        of_search = [run for run in runs if run.data.tags.get(PARENT) == self.search]
        return find_recorded(of_search, self.folder, self.begun, begun_in)

    @property
    def _level(self) -> str:
        return "sequence" if self.search is None else "trial"

    def _make(self, experiment: Experiment, fingerprint: str, folder: Path) -> Run:
        tags = {
            **({} if self.search is None else {PARENT: self.search}),
            LEVEL: self._level,
            "zscl.method": experiment.method.name,
            "zscl.seed": str(experiment.seed),
            FINGERPRINT: fingerprint,
            FOLDER: mask(str(folder)),
            **provenance(),
        }
        return self.client.create_run(
            self.experiment_id, start_time=self.begun, run_name=folder.name[:LONGEST_NAME], tags=tags
        )

    def _child(self, stage: int, time: int, task: str = "") -> str:
        """The run of a stage that is under way; where somebody deleted it, another one."""
        if stage not in self._children:
            found = self._find_child(stage)
            if found is None:
                tags = {PARENT: self.parent, LEVEL: "stage", STAGE: str(stage)}
                name = f"{stage}-{task}".rstrip("-")[:LONGEST_NAME]
                found = self.client.create_run(self.experiment_id, start_time=time, run_name=name, tags=tags)
            elif found.info.status != "RUNNING":  # it goes on
                self.client.update_run(found.info.run_id, status="RUNNING")
            self._children[stage] = str(found.info.run_id)
        return self._children[stage]

    def _find_child(self, stage: int) -> Run | None:
        query = f"tags.`{PARENT}` = '{self.parent}' and tags.`{STAGE}` = '{stage}'"
        runs = self.client.search_runs([self.experiment_id], query, max_results=1)
        return runs[0] if runs else None

    def _send_event(self, entry: JournalEntry) -> None:
        match progress := entry.progress:
            case StageStarted():
                self._child(progress.stage, entry.time, progress.task)
            case StageTrained():
                child = self._child(progress.result.stage, entry.time)
                log_metrics(self.client, child, [Metric("train_seconds", progress.result.train_seconds, entry.time, 0)])
                self._try_to_log_model(child, progress.result)
            case WorkersUsed():
                log_metrics(self.client, self._child(progress.stage, entry.time), _usage(progress, entry.time))
            case RowMeasured():
                self._send_row(progress, entry.time)

    def _log_model(self, child: str, trained: StageResult) -> None:
        """Log what the stage hands on as one of MLflow's models, where the recipe asks for it and it is there still."""
        wanted, last = self.experiment.tracking.models, trained.stage == len(self.experiment.tasks)
        folder = model_folder(self.folder, trained.stage, trained.task)
        if self.search is not None or wanted == "none" or (wanted == "last" and not last) or not folder.is_dir():
            return
        from orchestrate.tracking.registered_models import log_model  # takes seconds to import

        name = re.sub(r"[/:.%\"']", "_", f"{self.folder.name}-{trained.stage}-{trained.task}")  # not taken by MLflow
        log_model(self.client, self.experiment_id, child, name, folder, partial(self._words, trained.stage))

    def _try_to_log_model(self, child: str, trained: StageResult) -> None:
        """Log a stage's model while the run goes on; once that failed, all wait for the end.

        The model is on disk, the curves are worth more, and a store that does not answer may take minutes to say so.
        """
        if self._artifacts_failed:
            return
        try:
            self._log_model(child, trained)
        except Exception as error:  # whatever the library of an artefact store raises
            self._artifacts_failed = True
            log.warning(
                "MLflow did not take the model of stage %d (%s); it is sent again at the end of the run",
                trained.stage, reason_of(error, self._uri),
            )  # fmt: skip

    def _words(self, stage: int) -> tuple[Sequence[str], Sequence[str]]:
        """Class names and templates of a stage's task; none where its folder cannot be read from here."""
        try:
            task = resolve_tasks(self.experiment)[1][stage - 1]
        except InputError:
            return (), ()
        return task.classnames, task.templates

    def _send_row(self, row: RowMeasured, time: int) -> None:
        cells = _row(row.accuracy, time, row.stage)
        log_metrics(self.client, self.parent, cells)
        if row.stage == 0:
            order = ", ".join(row.accuracy)[:LONGEST_VALUE]
            self.client.log_batch(self.parent, params=[Param("tasks", order)], tags=[RunTag("zscl.order", order)])
        else:
            child = self._child(row.stage, time)
            log_metrics(self.client, child, cells)
            self.client.set_terminated(child, "FINISHED", time)
            del self._children[row.stage]


def _stage_of_steps(entry: JournalEntry) -> int | None:
    return entry.progress.stage if isinstance(entry.progress, StepsTaken) else None


def _curves(entry: JournalEntry) -> list[Metric]:
    taken, time = entry.progress, entry.time
    assert isinstance(taken, StepsTaken)
    curves = []
    for step in taken.steps:
        curves.append(Metric("learning_rate", step.learning_rate, time, step.step))
        curves.append(Metric("gradient_norm", step.gradient_norm, time, step.step))
        curves += [Metric(f"loss/{name}", value, time, step.step) for name, value in step.losses.items()]
    curves.append(Metric("images_per_second", taken.images_per_second, time, taken.steps[-1].step))
    return curves


def _usage(used: WorkersUsed, time: int) -> list[Metric]:
    """Where MLflow's pages look for system metrics, and as its own are called."""
    metrics = []
    for number, worker in enumerate(used.workers):
        figures = {
            "images_per_second": worker.images_per_second,
            "loader_wait_percentage": 100 * worker.loader_wait_share,
            "cpu_utilization_percentage": 100 * worker.cpu_cores,
            "process_memory_usage_megabytes": worker.memory_megabytes,
            "gpu_memory_usage_megabytes": worker.gpu_memory_megabytes,
        }
        metrics += [
            Metric(f"system/worker-{number}/{name}", value, time, used.step)
            for name, value in figures.items()
            if value is not None
        ]
    return metrics


def _row(accuracy: dict[str, float], time: int, stage: int) -> list[Metric]:
    cells = [Metric(f"accuracy/{task}", value, time, stage) for task, value in accuracy.items()]
    return [*cells, Metric("accuracy_mean", sum(accuracy.values()) / len(accuracy), time, stage)]
