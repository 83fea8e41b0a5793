"""A trial of a hyperparameter search: a Ray Tune actor that trains the sequence of tasks and reports after every stage.

The folder of a trial is a run's folder whose name is the trial's fingerprint. The result of a finished trial is read
from its folder, and a killed trial is resumed. With one worker, the actor itself trains; with several, the actor starts
the workers with Ray Train.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from filelock import FileLock
from pydantic import BaseModel
from ray import tune

from orchestrate.cluster.connect import check_resources
from orchestrate.cluster.train_workers import train
from orchestrate.lifecycle.run_status import write_state
from orchestrate.lifecycle.signals import StopRequest
from orchestrate.recipes.recipe import build_trial_experiment, write_experiment
from orchestrate.search.samplers import TRIAL_NUMBER
from schemas.base import parse_json
from schemas.errors import InputError, InterruptedRunError
from schemas.events import RowMeasured, StageTrained
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import Result
from schemas.search import Search, TrialEnded, TrialEvent, TrialStarted, objective_values
from zscl.evaluation.metrics import compute_metrics
from zscl.runtime.atomic_io import link_folder
from zscl.runtime.retry import try_acquire
from zscl.sequence.layout import EXPERIMENT, RESULT, lock_file, stage_cache_folder, teacher_cache_folder
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.run import run_sequence
from zscl.sequence.stage_cache import Averages, SharedWork
from zscl.training.checkpoint import StoppedError

STAGES_DONE = "stages_done"  # key of a report; Tune uses its value as the time of the trial
POLL_SECONDS = 0.5
WORKERS_STOP_SECONDS = 300.0  # grace period in which the workers of a stopped trial must stop


@dataclass(frozen=True)
class TrialContext:
    """The context that all trials of a search share.

    Attributes:
        search: The search.
        content: The content of the experiment's recipe, before a trial's values are inserted.
        file: The recipe's file, for error messages.
        folder: The search's folder.
        averages: The averaging settings that occur in the trials. Trials that differ only in averaging share the
            training of the first stage. Empty if no trials can share it.
        channel: Handle of the `RunChannel` actor that forwards events to the main process of the search.
    """

    search: Search
    content: Mapping[str, Any]
    file: Path
    folder: Path
    averages: Averages
    channel: Any

    @property
    def shared(self) -> SharedWork:
        """The caches that trials share: trained stages of this search, and features that the teacher computed."""
        return SharedWork(teacher_cache_folder(self.folder), stage_cache_folder(self.folder), self.averages)

    def trial_folder(self, fingerprint: str) -> Path:
        """Return the folder of a trial from the trial's fingerprint."""
        return self.folder / "trials" / fingerprint


class SearchTrial(tune.Trainable):  # type: ignore[misc]
    """A trial of a search as a Ray Tune trainable. Each step of the trainable is one stage of the trial.

    A stage starts only when Tune requests the step.
    """

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Prepare the trial. Training starts in `step`, because Tune may move the trial to another actor before that.

        Args:
            config: Mapping from `TRIAL_NUMBER` to the trial's number, and from field paths to encoded values.
            context: The context that all trials share.
        """
        self._context, self._reported = context, False
        self._thread: threading.Thread | None = None
        self._reset(config)

    def step(self) -> dict[str, Any]:
        """Let the trial continue, and wait until its next stage or the trial is finished.

        Returns:
            The trial's report to Tune. It contains the objectives over the finished stages, the number of
            finished stages, and the status.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_in_thread, name="sequence", daemon=True)
            self._thread.start()
        if self._reported:  # Tune has processed the last report and continues the trial
            self._may_continue.set()
        report = self._reports.get()
        if isinstance(report, BaseException):
            raise report
        self._reported = True
        return report

    def cleanup(self) -> None:
        """Stop the trial if it is still running, and wait for its thread."""
        self._stopped_early.set()
        if self._thread is not None:
            self._thread.join()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: the trial's folder is its own checkpoint."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Do nothing: the trial's folder is its own checkpoint."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Reuse this process, with its imports and decoded images, for another trial.

        Args:
            new_config: The new trial's configuration, as in `setup`.

        Returns:
            Always `True`: the actor can be reused.
        """
        self.cleanup()
        self._reset(new_config)
        return True

    def _reset(self, config: dict[str, Any]) -> None:
        self._number = config[TRIAL_NUMBER]
        self._values = {path: domain.decode(config[path]) for path, domain in self._context.search.domains.items()}
        self._reports: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._may_continue, self._stopped_early = threading.Event(), threading.Event()
        self._reported = False
        self._stages = self._shared_stages = 0
        self._rows: list[dict[str, float]] = []
        self._zero_shot: dict[str, float] = {}
        self._fingerprint = ""
        self._thread = None

    # ------------------------------------------------------------------------------------------ in the thread

    def _run_in_thread(self) -> None:
        """Run the trial, and report its result or its error to Tune."""
        try:
            self._report_result(self._run())
        except InputError as error:  # a retry would raise it again
            self._record_state("FAILED", str(error))
            self._report_end("failed", str(error))
        except (StoppedError, InterruptedRunError) as stop:
            if self._stopped_early.is_set():
                self._record_state("KILLED", f"stopped early after stage {self._stages}")
                self._send(TrialEnded(status="stopped", stages=self._stages, objectives=self._objectives()))
            else:  # the search was interrupted: Tune gets no report and resumes the trial later
                self._record_state("KILLED", str(stop))
                self._send(TrialEnded(status="interrupted", stages=self._stages, objectives=self._objectives()))
        except BaseException as error:  # Tune retries the trial
            self._record_state("FAILED", mask(f"{type(error).__name__}: {error}"))
            self._reports.put(error)

    def _run(self) -> Result:
        context = self._context
        resolved = self._resolved = resolve(
            build_trial_experiment(context.search, context.content, self._values, context.file)
        )
        self._fingerprint, folder = resolved.fingerprint, context.trial_folder(resolved.fingerprint)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self._trial_lock(folder):
            result_file = folder / RESULT
            if not result_file.is_file():
                self._link_from_other_search(folder)
            self._was_finished = result_file.is_file()
            write_experiment(resolved.experiment, folder / EXPERIMENT)
            self._send(
                TrialStarted(
                    values=self._values,
                    fingerprint=resolved.fingerprint,
                    folder=str(folder),
                    read=self._was_finished,
                )
            )
            if self._was_finished:
                advice = "remove the file, and the trial writes it again"
                return parse_json(Result, result_file.read_bytes(), result_file, advice)
            write_state(folder, "RUNNING")
            result = self._run_sequence(resolved, folder)
            write_state(folder, "FINISHED")
            return result

    @contextmanager
    def _trial_lock(self, folder: Path) -> Iterator[None]:
        """Context manager: hold the lock of the trial's folder.

        A sampler may suggest the same values for two trials, which then have the same folder. The second trial waits
        until the first one has finished.

        Raises:
            StoppedError: The trial was stopped while it waited for the lock.
        """
        lock = FileLock(lock_file(folder))
        while not try_acquire(lock, POLL_SECONDS):
            if self._stop_requested():
                raise StoppedError("stopped while waiting for another trial with the same values")
        try:
            yield
        finally:
            lock.release()

    def _link_from_other_search(self, folder: Path) -> None:
        """If a search in a sibling folder has finished a trial with this fingerprint, link its files into `folder`."""
        searches = self._context.folder.parent
        for finished in sorted(searches.glob(f"*/trials/{folder.name}/{RESULT}")):
            link_folder(finished.parent, folder)
            return

    def _run_sequence(self, resolved: ResolvedExperiment, folder: Path) -> Result:
        experiment, shared = resolved.experiment, self._context.shared
        if experiment.compute.workers == 1:
            return run_sequence(resolved, folder, self._on_event, _device(), self._stop_requested, shared)
        with StopPoller(self._stop_requested) as stop_request:
            return train(experiment, folder, self._on_event, stop_request, shared, grace_seconds=WORKERS_STOP_SECONDS)

    def _on_event(self, event: BaseModel) -> None:
        """Forward an event to the search. After a stage, report to Tune and wait until the trial may continue."""
        self._send(event)
        if isinstance(event, StageTrained):
            self._shared_stages += event.result.shared
        if not isinstance(event, RowMeasured):
            return
        if event.stage == 0:
            self._zero_shot = event.accuracy
            return
        self._rows.append(event.accuracy)
        self._stages = event.stage
        if self._stages < len(self._resolved.tasks):
            self._may_continue.clear()
            self._reports.put(self._report(done=False))
            in_actor = self._resolved.experiment.compute.workers == 1  # Ray Train's workers continue until stopped
            while in_actor and not self._may_continue.wait(POLL_SECONDS):
                if self._stop_requested():
                    raise StoppedError(f"stopped after stage {self._stages}")

    def _report_result(self, result: Result) -> None:
        names = [task.name for task in result.tasks]
        self._stages = len(result.accuracy_matrix)
        last_row = dict(zip(names, result.accuracy_matrix[-1], strict=True))
        objectives = objective_values(self._context.search.objectives, result.metrics, last_row)
        self._report_end("read" if self._was_finished else "finished", "", objectives, result.train_seconds)

    def _report_end(
        self, status: Any, reason: str, objectives: Mapping[str, float] | None = None, train_seconds: float = 0.0
    ) -> None:
        values = dict(objectives or {})
        self._send(TrialEnded(status=status, reason=reason, stages=self._stages, objectives=values))
        undefined = dict.fromkeys(self._context.search.objectives, float("nan"))  # Optuna counts NaN as a failure
        report = {**self._report(done=True), **undefined, **values}
        self._reports.put({**report, "status": status, "reason": reason, "train_seconds": train_seconds})

    def _report(self, done: bool) -> dict[str, Any]:
        return {
            **self._objectives(),
            STAGES_DONE: self._stages,
            "shared_stages": self._shared_stages,
            "fingerprint": self._fingerprint,
            "status": "running",
            "done": done,
        }

    def _objectives(self) -> dict[str, float]:
        """Compute the objectives over the finished stages. Return an empty dictionary if no stage is finished."""
        if not self._rows:
            return {}
        tasks = self._resolved.tasks
        matrix = [[row[task.name] for task in tasks] for row in self._rows]
        one_head = self._resolved.experiment.class_incremental is not None
        images = [len(task.test) for task in tasks] if one_head else None  # type: ignore[arg-type]  # local data
        figures = compute_metrics(matrix, [self._zero_shot[task.name] for task in tasks], images)
        return objective_values(self._context.search.objectives, figures, self._rows[-1])

    def _record_state(self, status: Any, reason: str) -> None:
        if self._fingerprint:
            write_state(self._context.trial_folder(self._fingerprint), status, reason)

    def _stop_requested(self) -> bool:
        return self._stopped_early.is_set() or bool(ray.get(self._context.channel.stop_requested.remote()))

    def _send(self, event: BaseModel) -> None:
        _send_event(self._context.channel, self._number, event)


class StopPoller(StopRequest):
    """A stop request that a background thread updates while the `with` block runs.

    The thread repeatedly calls a function that returns whether to stop. The function may be a slow remote call. Code
    that reads the stop request, such as `train`, does not wait for this call.
    """

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        super().__init__()
        self._stop_requested = stop_requested
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stop-poller", daemon=True)

    def __enter__(self) -> "StopPoller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def poll(self) -> None:
        """Call the function once. An error of Ray means that the search has ended, and also sets the stop request."""
        try:
            stop = self._stop_requested()
        except ray.exceptions.RayError:
            stop = True
        if stop:
            self.request()

    def _run(self) -> None:
        while not self and not self._closed.wait(POLL_SECONDS):
            self.poll()


def evaluate_on_test(experiment: Experiment, folder: Path, context: TrialContext) -> Result:
    """Evaluate the trained stages of a trial on the test images, on the cluster. Called in the search's main process.

    Args:
        experiment: The trial's experiment, changed so that it is evaluated on the test images.
        folder: The run's folder with the trained stages.
        context: The context that all trials share.

    Returns:
        The run's result on the test images.
    """
    compute, shared = experiment.compute, SharedWork(context.shared.teacher_cache)
    if compute.workers > 1:
        return train(experiment, folder, partial(_send_event, context.channel, 0), StopRequest(), shared)
    gpus = compute.gpus_per_worker if check_resources(compute) else 0.0
    task = ray.remote(_evaluate).options(num_cpus=compute.cpus_per_worker, num_gpus=gpus)
    answer = ray.get(task.remote(experiment.model_dump_json(), folder, context.channel, shared))
    return Result.model_validate_json(answer)


def _evaluate(experiment: str, folder: Path, channel: Any, shared: SharedWork) -> str:
    resolved = resolve(Experiment.model_validate_json(experiment))
    on_event = partial(_send_event, channel, 0)
    return run_sequence(resolved, folder, on_event, _device(), shared=shared).model_dump_json()


def _device() -> torch.device:
    """Return the device that Ray assigned to this process."""
    return torch.device("cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu")


def _send_event(channel: Any, trial: int, event: BaseModel) -> None:
    news = TrialEvent(trial=trial, news=event)  # type: ignore[arg-type]
    ray.get(channel.put.remote(news.model_dump_json()))
