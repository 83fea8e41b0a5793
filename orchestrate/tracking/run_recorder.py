"""Recording of a run in MLflow: a parent run for the sequence of tasks, and a child run for each stage.

The metrics' names suit MLflow's compare view. The parent run has one metric per task, `accuracy/<task>`, whose step is
the number of trained stages (0 for the zero-shot accuracy). The metrics of a child run are the losses, the learning
rate and the gradient norm at each training step.

Sending a journal entry again has no effect. Runs are found by fingerprint and start time, and MLflow drops a metric
that it already has with the same timestamp. The timestamp of a metric is the time of its journal entry.
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
from orchestrate.reports.results import build_matrix_columns
from orchestrate.tracking.mlflow_client import (
    ARTIFACTS_MISSING,
    FINGERPRINT,
    FOLDER,
    JOURNAL_POSITION,
    LEVEL,
    MAX_NAME_LENGTH,
    MAX_VALUE_LENGTH,
    PARENT,
    REASON,
    clear_reason,
    find_run_of_folder,
    finish_run,
    flatten,
    log_metrics,
    log_table,
    open_store,
    provenance_tags,
    search_runs,
    valid_name,
)
from orchestrate.tracking.store_errors import root_cause
from schemas.errors import InputError
from schemas.events import JournalEntry, RowMeasured, StageStarted, StageTrained, StepsTaken, WorkersUsed
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import Result, RunState, StageResult
from zscl.sequence.journal import read_start_time
from zscl.sequence.layout import EXPERIMENT, RESULT, model_folder
from zscl.sequence.resolve import resolve_tasks

log = logging.getLogger(__name__)

STAGE = "zscl.stage"
MAX_DIGEST_LENGTH = 36  # MLflow's limit for the digest of a dataset


class RunRecorder:
    """Recorder of one run in a tracking store. Every method may raise one of `store_errors.FAILURES`.

    Attributes:
        client: The store.
        experiment: The run's experiment.
        experiment_id: ID of the MLflow experiment.
        folder: The run's folder.
        run_id: ID of the parent run.
        search_run_id: ID of the search's MLflow run; `None` if this run is not a trial of a search.
        start_time: Time of the journal's first entry, in milliseconds; `None` while there is none.
        position: Number of entries of the run's journal that the store already contains.
        status: The status of the parent run in MLflow when this object was created.
        is_complete: Whether the store contains the final status and all files of the run.
    """

    def __init__(
        self,
        experiment: Experiment,
        fingerprint: str,
        folder: Path,
        uri: str,
        start_time: int | None,
        search_run_id: str | None = None,
    ) -> None:
        """Find the run in the store, or create it.

        Args:
            experiment: The run's experiment.
            fingerprint: The experiment's fingerprint.
            folder: The absolute path of the run's folder.
            uri: Tracking URI.
            start_time: Time of the journal's first entry, in milliseconds; `None` if there is none. It distinguishes
                the run from an earlier run of the same experiment whose folder was deleted.
            search_run_id: ID of the search's MLflow run; `None` if this run is not a trial of a search.
        """
        self.start_time, self.search_run_id = start_time, search_run_id
        self.experiment, self.folder = experiment, folder
        self.client, self.experiment_id = open_store(uri, experiment.tracking.experiment)
        self._run = self._find(fingerprint) or self._create(fingerprint)
        tags = self._run.data.tags
        self.run_id, self.status = str(self._run.info.run_id), str(self._run.info.status)
        self.is_complete = self.status == "FINISHED" and ARTIFACTS_MISSING not in tags
        self.position = int(tags.get(JOURNAL_POSITION, "0").partition(" ")[0])
        self._stage_run_ids: dict[int, str] = {}
        self._model_upload_failed = False
        if tags.get(FOLDER) != mask(str(folder)):  # the folder was moved
            self.client.set_tag(self.run_id, FOLDER, mask(str(folder)))
        if not self._run.data.params:
            settings = experiment.model_dump(mode="json", exclude={"compute", "tracking", "tasks"})
            settings["optimisation"]["warmup_steps"] = experiment.warmup_steps
            params = [Param(valid_name(name), mask(str(value))[:MAX_VALUE_LENGTH]) for name, value in flatten(settings)]
            self.client.log_batch(self.run_id, params=params)

    def resume(self) -> None:
        """Set the run's status to RUNNING, and delete the reason for an earlier failure."""
        self.client.update_run(self.run_id, status="RUNNING")
        clear_reason(self.client, self.run_id)

    def send(self, entries: Sequence[JournalEntry]) -> None:
        """Send journal entries to the store, then record in it how many entries it contains.

        Args:
            entries: One or more consecutive entries of the journal, starting at the index `position`.
        """
        for stage, group in groupby(entries, key=_stage_of_steps):
            if stage is None:
                for entry in group:
                    self._send_event(entry)
            else:  # send consecutive steps of a stage in few calls
                metrics = [metric for entry in group for metric in _step_metrics(entry)]
                log_metrics(self.client, self._stage_run_id(stage, metrics[0].timestamp), metrics)
        self.start_time = self.start_time or entries[0].time
        self.client.set_tag(self.run_id, JOURNAL_POSITION, f"{self.position + len(entries)} since {self.start_time}")
        self.position += len(entries)

    def finish(self, result: Result, metric_time: int, end_time: int, files: bool = True) -> None:
        """Record the result and set the parent run's status to FINISHED.

        Args:
            result: The run's result.
            metric_time: Timestamp of the result's metrics, in milliseconds. It must be the same in every attempt.
            end_time: The time at which the run finished, in milliseconds.
            files: Whether to upload the run's files.

        Raises:
            ArtifactError: The files could not be uploaded. Everything else is recorded.
        """
        values = result.metrics.model_dump() | {
            "zero_shot/transfer": result.zero_shot_metrics.transfer,
            "zero_shot/avg": result.zero_shot_metrics.avg,
        }
        metrics = [Metric(name, value, metric_time, 0) for name, value in values.items() if value is not None]
        if not result.stages:  # a method without training reports no events for rows, so they are logged here
            names = [task.name for task in result.tasks]
            for stage, row in enumerate(result.accuracy_matrix, start=1):
                metrics += _row_metrics(dict(zip(names, row, strict=True)), metric_time, stage)
        log_metrics(self.client, self.run_id, metrics)
        self._log_datasets(result)
        if result.warnings:
            self.client.set_tag(self.run_id, "zscl.warnings", "\n".join(result.warnings)[:MAX_VALUE_LENGTH])
        upload_files = partial(self._log_files, result) if files else None
        finish_run(self.client, self._run, self.folder, end_time, upload_files)
        self.is_complete = files

    def fail(self, state: RunState) -> None:
        """Set the status of the parent run and of the running stage to FAILED or KILLED, and record the reason."""
        query = f"tags.`{PARENT}` = '{self.run_id}' and attributes.status = 'RUNNING'"
        for stage in self.client.search_runs([self.experiment_id], query):
            self.client.set_terminated(stage.info.run_id, state.status, state.time)
        self.client.set_tag(self.run_id, REASON, state.reason[:MAX_VALUE_LENGTH])
        self.client.set_terminated(self.run_id, state.status, state.time)

    def _log_files(self, result: Result) -> None:
        """Log the recipe, the result, the accuracy matrix, charts, and models that are not logged yet."""
        self.client.log_artifact(self.run_id, str(self.folder / EXPERIMENT))
        self.client.log_artifact(self.run_id, str(self.folder / RESULT))
        log_table(self.client, self.run_id, build_matrix_columns(result), "accuracy_matrix.json")
        self.client.log_figure(self.run_id, draw_matrix(result), "figures/accuracy_matrix.png")
        self.client.log_figure(self.run_id, draw_accuracies(result), "figures/accuracy_by_stage.png")
        for trained in result.stages:
            if run := self._find_stage_run(trained.stage):
                self._log_model(run.info.run_id, trained)

    def _log_datasets(self, result: Result) -> None:
        """Log the datasets with their digests and split families, unless they are logged already."""
        if self.client.get_run(self.run_id).inputs.dataset_inputs:
            return
        context = [InputTag("mlflow.data.context", "training and evaluation")]
        datasets = [
            DatasetInput(
                Dataset(
                    name=task.name,
                    digest=task.digest[:MAX_DIGEST_LENGTH],
                    source_type="local",
                    source=json.dumps({"uri": task.path}),
                    profile=json.dumps({"split_family": task.split_family, "test_images": task.test_images}),
                ),
                context,
            )
            for task in result.tasks
        ]
        if result.reference:
            digest, texts = result.reference[:MAX_DIGEST_LENGTH], json.dumps({"texts": result.reference_texts})
            reference = Dataset("reference", digest, "local", json.dumps({"uri": ""}), profile=texts)
            datasets.append(DatasetInput(reference, [InputTag("mlflow.data.context", "reference")]))
        self.client.log_inputs(self.run_id, datasets=datasets)

    @property
    def _level(self) -> str:
        return "sequence" if self.search_run_id is None else "trial"

    def _find(self, fingerprint: str) -> Run | None:
        runs = search_runs(self.client, [self.experiment_id], fingerprint, [self._level])
        runs = [run for run in runs if run.data.tags.get(PARENT) == self.search_run_id]
        return find_run_of_folder(runs, self.folder, self.start_time, read_start_time)

    def _create(self, fingerprint: str) -> Run:
        tags = {
            **({} if self.search_run_id is None else {PARENT: self.search_run_id}),
            LEVEL: self._level,
            "zscl.method": self.experiment.method.name,
            "zscl.seed": str(self.experiment.seed),
            FINGERPRINT: fingerprint,
            FOLDER: mask(str(self.folder)),
            **provenance_tags(),
        }
        name = self.folder.name[:MAX_NAME_LENGTH]
        return self.client.create_run(self.experiment_id, start_time=self.start_time, run_name=name, tags=tags)

    def _stage_run_id(self, stage: int, time: int, task: str = "") -> str:
        """Return the ID of a stage's MLflow run. Create the run if necessary, and set its status to RUNNING."""
        if stage not in self._stage_run_ids:
            run = self._find_stage_run(stage)
            if run is None:
                tags = {PARENT: self.run_id, LEVEL: "stage", STAGE: str(stage)}
                name = f"{stage}-{task}".rstrip("-")[:MAX_NAME_LENGTH]
                run = self.client.create_run(self.experiment_id, start_time=time, run_name=name, tags=tags)
            elif run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")
            self._stage_run_ids[stage] = str(run.info.run_id)
        return self._stage_run_ids[stage]

    def _find_stage_run(self, stage: int) -> Run | None:
        query = f"tags.`{PARENT}` = '{self.run_id}' and tags.`{STAGE}` = '{stage}'"
        runs = self.client.search_runs([self.experiment_id], query, max_results=1)
        return runs[0] if runs else None

    def _send_event(self, entry: JournalEntry) -> None:
        match event := entry.progress:
            case StageStarted():
                self._stage_run_id(event.stage, entry.time, event.task)
            case StageTrained():
                run_id = self._stage_run_id(event.result.stage, entry.time)
                log_metrics(self.client, run_id, [Metric("train_seconds", event.result.train_seconds, entry.time, 0)])
                self._try_log_model(run_id, event.result)
            case WorkersUsed():
                log_metrics(self.client, self._stage_run_id(event.stage, entry.time), _usage_metrics(event, entry.time))
            case RowMeasured():
                self._send_row(event, entry.time)

    def _log_model(self, run_id: str, trained: StageResult) -> None:
        """Log a stage's model, if `tracking.models` selects the stage and the model's folder still exists."""
        setting, is_last = self.experiment.tracking.models, trained.stage == len(self.experiment.tasks)
        folder = model_folder(self.folder, trained.stage, trained.task)
        is_selected = setting == "all" or (setting == "last" and is_last)
        if self.search_run_id is not None or not is_selected or not folder.is_dir():
            return
        from orchestrate.tracking.registered_models import log_model  # takes seconds to import

        # MLflow does not accept these characters in a model's name.
        name = re.sub(r"[/:.%\"']", "_", f"{self.folder.name}-{trained.stage}-{trained.task}")
        load_prompts = partial(self._load_prompts, trained.stage)
        log_model(self.client, self.experiment_id, run_id, name, folder, load_prompts)

    def _try_log_model(self, run_id: str, trained: StageResult) -> None:
        """Log a stage's model during the run. After one failure, log no more models until the end of the run.

        If the artifact store does not answer, each attempt may take minutes, which would delay the metrics.
        """
        if self._model_upload_failed:
            return
        try:
            self._log_model(run_id, trained)
        except Exception as error:  # the client libraries of artifact stores raise errors of any type
            self._model_upload_failed = True
            log.warning(
                "MLflow did not accept the model of stage %d (%s); it is sent again at the end of the run",
                trained.stage, root_cause(error, self.client.tracking_uri),
            )  # fmt: skip

    def _load_prompts(self, stage: int) -> tuple[Sequence[str], Sequence[str]]:
        """Load the class names and templates of a stage's task. Return empty tuples if the task is unreadable."""
        try:
            task = resolve_tasks(self.experiment)[1][stage - 1]
        except InputError:
            return (), ()
        return task.classnames, task.templates

    def _send_row(self, row: RowMeasured, time: int) -> None:
        metrics = _row_metrics(row.accuracy, time, row.stage)
        log_metrics(self.client, self.run_id, metrics)
        if row.stage == 0:
            order = ", ".join(row.accuracy)[:MAX_VALUE_LENGTH]
            self.client.log_batch(self.run_id, params=[Param("tasks", order)], tags=[RunTag("zscl.order", order)])
        else:
            run_id = self._stage_run_id(row.stage, time)
            log_metrics(self.client, run_id, metrics)
            self.client.set_terminated(run_id, "FINISHED", time)
            del self._stage_run_ids[row.stage]


def _stage_of_steps(entry: JournalEntry) -> int | None:
    return entry.progress.stage if isinstance(entry.progress, StepsTaken) else None


def _step_metrics(entry: JournalEntry) -> list[Metric]:
    event, time = entry.progress, entry.time
    assert isinstance(event, StepsTaken)
    metrics = []
    for step in event.steps:
        metrics.append(Metric("learning_rate", step.learning_rate, time, step.step))
        metrics.append(Metric("gradient_norm", step.gradient_norm, time, step.step))
        metrics += [Metric(f"loss/{name}", value, time, step.step) for name, value in step.losses.items()]
    metrics.append(Metric("images_per_second", event.images_per_second, time, event.steps[-1].step))
    return metrics


def _usage_metrics(event: WorkersUsed, time: int) -> list[Metric]:
    """Return the resource usage of every worker as metrics with the names of MLflow's system metrics."""
    metrics = []
    for rank, worker in enumerate(event.workers):
        values = {
            "images_per_second": worker.images_per_second,
            "loader_wait_percentage": 100 * worker.loader_wait_share,
            "cpu_utilization_percentage": 100 * worker.cpu_cores,
            "process_memory_usage_megabytes": worker.memory_megabytes,
            "gpu_memory_usage_megabytes": worker.gpu_memory_megabytes,
        }
        metrics += [
            Metric(f"system/worker-{rank}/{name}", value, time, event.step)
            for name, value in values.items()
            if value is not None
        ]
    return metrics


def _row_metrics(accuracy: dict[str, float], time: int, stage: int) -> list[Metric]:
    """Return the accuracies on all tasks after a stage, and their mean, as metrics whose step is the stage."""
    metrics = [Metric(f"accuracy/{task}", value, time, stage) for task, value in accuracy.items()]
    return [*metrics, Metric("accuracy_mean", sum(accuracy.values()) / len(accuracy), time, stage)]
