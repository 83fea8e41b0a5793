"""One trial of a search, in an actor of Ray Tune's: the same sequence code as any run, told to Tune stage by stage.

A trial's folder is a run's folder, named by its fingerprint: what was finished before is read, what was killed goes on.
With one worker the sequence runs in the actor itself; with more, through Ray Train from there.
"""

import queue
import threading
import time
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
from orchestrate.lifecycle.paths import EXPERIMENT
from orchestrate.lifecycle.run_status import write_state
from orchestrate.lifecycle.signals import StopRequest
from orchestrate.recipes.recipe import with_values, write_experiment
from orchestrate.search.samplers import NUMBER
from schemas.base import parse_json
from schemas.errors import InputError, InterruptedRunError
from schemas.events import RowMeasured, StageTrained
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import Result
from schemas.search import Search, TrialEnded, TrialNews, TrialStarted, objectives_of
from zscl.evaluation.metrics import metrics
from zscl.runtime.atomic_io import link_folder
from zscl.runtime.retry import try_acquire
from zscl.sequence.layout import RESULT
from zscl.sequence.resolve import ResolvedExperiment, resolve
from zscl.sequence.run import run_sequence
from zscl.sequence.stage_cache import Averages, SharedWork
from zscl.training.checkpoint import StoppedError

STAGES = "stages_done"  # what Tune counts a trial's time in
LOOK_EVERY_SECONDS = 0.5
WORKERS_STOP_SECONDS = 300.0  # of a trial that is given up, so that nothing of it is left behind


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search have in common.

    search: what is looked for; content: of the experiment, without values; file: the recipe, for what is refused;
    folder: the search's; averages: of all trials; line: to the process that watches (see
    `orchestrate.cluster.channel`).
    """

    search: Search
    content: Mapping[str, Any]
    file: Path
    folder: Path
    averages: Averages
    channel: Any

    @property
    def shared(self) -> SharedWork:
        """What the trials share: stages among each other, the teacher's embeddings with all runs beside the search."""
        return SharedWork(self.folder.parent / "teacher", self.folder / "stages", self.averages)

    def place(self, fingerprint: str) -> Path:
        """The folder of a trial."""
        return self.folder / "trials" / fingerprint


class SearchTrial(tune.Trainable):  # type: ignore[misc]
    """A trial: each step of Tune's is a stage of the sequence, which goes on only when it is asked for."""

    def setup(self, config: dict[str, Any], common: TrialContext) -> None:
        """Get ready; nothing begins before the first step, for Tune may yet give the trial to another actor."""
        self._common, self._told = common, False
        self._thread: threading.Thread | None = None
        self._get_ready(config)

    def step(self) -> dict[str, Any]:
        """Wait for the next stage to be finished. Returns the objectives by then."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="sequence", daemon=True)
            self._thread.start()
        if self._told:  # what came of the stage before: it was judged good enough
            self._asked.set()
        outcome = self._outcomes.get()
        if isinstance(outcome, BaseException):
            raise outcome
        self._told = True
        found: dict[str, Any] = outcome
        return found

    def cleanup(self) -> None:
        """Give the trial up, unless it is over, and wait until nothing of it goes on."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the trial's folder is its own checkpoint."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Get ready for another trial in this process, which has imported everything and decoded images."""
        self.cleanup()
        self._get_ready(new_config)
        return True

    def _get_ready(self, config: dict[str, Any]) -> None:
        self._number = config[NUMBER]
        self._values = {path: domain.meant(config[path]) for path, domain in self._common.search.domains.items()}
        self._outcomes: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._asked, self._given_up = threading.Event(), threading.Event()
        self._told = False
        self._stages = self._shared_stages = 0
        self._rows: list[dict[str, float]] = []
        self._zero_shot: dict[str, float] = {}
        self._fingerprint = ""
        self._thread = None

    # ------------------------------------------------------------------------------------------ in the thread

    def _work(self) -> None:
        """Run the sequence; whatever comes of it is an outcome."""
        try:
            self._tell_end(self._run())
        except InputError as error:  # it would be refused again
            self._settle("FAILED", str(error))
            self._finish("failed", str(error))
        except (StoppedError, InterruptedRunError) as stop:
            if self._given_up.is_set():
                self._settle("KILLED", f"given up early behind stage {self._stages}")
                self._news(TrialEnded(status="stopped", stages=self._stages, objectives=self._objectives()))
            else:  # the search was interrupted: Tune hears nothing more, and takes the trial up later
                self._settle("KILLED", str(stop))
                self._news(TrialEnded(status="interrupted", stages=self._stages, objectives=self._objectives()))
        except BaseException as error:  # Tune tries again
            self._settle("FAILED", mask(f"{type(error).__name__}: {error}"))
            self._outcomes.put(error)

    def _run(self) -> Result:
        opened = self._opened = resolve(
            with_values(self._common.search, self._common.content, self._values, self._common.file)
        )
        self._fingerprint, folder = opened.fingerprint, self._common.place(opened.fingerprint)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self._alone(folder):
            found = folder / RESULT
            if not found.is_file():
                self._take_from_other_search(folder)
            self._read = found.is_file()
            write_experiment(opened.experiment, folder / EXPERIMENT)
            started = TrialStarted(
                values=self._values, fingerprint=opened.fingerprint, folder=str(folder), read=self._read
            )
            self._news(started)
            if self._read:
                return parse_json(Result, found.read_bytes(), found, "remove the file, and the trial ends anew")
            write_state(folder, "RUNNING")
            result = self._sequence(opened, folder)
            write_state(folder, "FINISHED")
            return result

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Wait for another trial of the same values, if there is one: two may be suggested at once."""
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        while not try_acquire(lock, LOOK_EVERY_SECONDS):
            if self._asked_to_stop():
                raise StoppedError("stopped while another trial of the same values is at work")
        try:
            yield
        finally:
            lock.release()

    def _take_from_other_search(self, folder: Path) -> None:
        searches = self._common.folder.parent
        for finished in sorted(searches.glob(f"*/trials/{folder.name}/{RESULT}")):
            link_folder(finished.parent, folder)
            return

    def _sequence(self, opened: ResolvedExperiment, folder: Path) -> Result:
        experiment = opened.experiment
        if experiment.compute.workers == 1:
            return run_sequence(opened, folder, self._hear, _device(), self._asked_to_stop, self._common.shared)
        interruption = StopPoller(self._asked_to_stop)
        return train(
            experiment, folder, self._hear, interruption, self._common.shared, grace_seconds=WORKERS_STOP_SECONDS
        )

    def _hear(self, progress: BaseModel) -> None:
        """Take a piece of progress: pass it on, and let Tune judge a finished stage before the next one begins."""
        self._news(progress)
        if isinstance(progress, StageTrained):
            self._shared_stages += progress.result.shared
        if not isinstance(progress, RowMeasured):
            return
        if progress.stage == 0:
            self._zero_shot = progress.accuracy
            return
        self._rows.append(progress.accuracy)
        self._stages = progress.stage
        if self._stages < len(self._opened.tasks):
            self._asked.clear()
            self._outcomes.put(self._outcome(done=False))
            here = self._opened.experiment.compute.workers == 1  # elsewhere they go on until they are stopped
            while here and not self._asked.wait(LOOK_EVERY_SECONDS):
                if self._asked_to_stop():
                    raise StoppedError(f"stopped behind stage {self._stages}")

    def _tell_end(self, result: Result) -> None:
        names = [task.name for task in result.tasks]
        self._stages = len(result.accuracy_matrix)
        last = dict(zip(names, result.accuracy_matrix[-1], strict=True))
        objectives = objectives_of(self._common.search.objectives, result.metrics, last)
        self._finish("read" if self._read else "finished", "", objectives, result.train_seconds)

    def _finish(
        self, status: Any, reason: str, objectives: Mapping[str, float] | None = None, train_seconds: float = 0.0
    ) -> None:
        shown = dict(objectives or {})
        self._news(TrialEnded(status=status, reason=reason, stages=self._stages, objectives=shown))
        missing = dict.fromkeys(self._common.search.objectives, float("nan"))  # what Optuna takes for a failure
        outcome = {**self._outcome(done=True), **missing, **shown}
        self._outcomes.put({**outcome, "status": status, "reason": reason, "train_seconds": train_seconds})

    def _outcome(self, done: bool) -> dict[str, Any]:
        return {
            **self._objectives(),
            STAGES: self._stages,
            "shared_stages": self._shared_stages,
            "fingerprint": self._fingerprint,
            "status": "running",
            "done": done,
        }

    def _objectives(self) -> dict[str, float]:
        """Of the stages so far; before the first, nothing."""
        if not self._rows:
            return {}
        tasks = self._opened.tasks
        matrix = [[row[task.name] for task in tasks] for row in self._rows]
        one_head = self._opened.experiment.class_incremental is not None
        images = [len(task.test) for task in tasks] if one_head else None  # type: ignore[arg-type]  # local, then
        figures = metrics(matrix, [self._zero_shot[task.name] for task in tasks], images)
        return objectives_of(self._common.search.objectives, figures, self._rows[-1])

    def _settle(self, status: Any, reason: str) -> None:
        if self._fingerprint:
            write_state(self._common.place(self._fingerprint), status, reason)

    def _asked_to_stop(self) -> bool:
        return self._given_up.is_set() or bool(ray.get(self._common.channel.asked_to_stop.remote()))

    def _news(self, news: BaseModel) -> None:
        _tell(self._common.channel, self._number, news)


class StopPoller(StopRequest):
    """An interruption that comes of another wish than a signal."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        super().__init__()
        self._wish, self._next_look = asked, 0.0

    def __bool__(self) -> bool:
        if not super().__bool__() and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_SECONDS
            if self._wish():
                self.ask()
        return super().__bool__()


def judged_on_test(experiment: Experiment, place: Path, common: TrialContext) -> Result:
    """Judge trained stages in a run's folder, on the cluster; called in the process that watches.

    Args:
        experiment: trained as a trial's, judged on the test images.
        place: the folder; its stages are trained.
        common: of the search.
    """
    compute, shared = experiment.compute, SharedWork(common.shared.teacher)
    if compute.workers > 1:
        return train(experiment, place, partial(_tell, common.channel, 0), StopRequest(), shared)
    gpus = compute.gpus_per_worker if check_resources(compute) else 0.0
    task = ray.remote(_judge).options(num_cpus=compute.cpus_per_worker, num_gpus=gpus)
    return Result.model_validate_json(ray.get(task.remote(experiment.model_dump_json(), place, common.channel, shared)))


def _judge(experiment: str, place: Path, line: Any, shared: SharedWork) -> str:
    opened = resolve(Experiment.model_validate_json(experiment))
    return run_sequence(opened, place, partial(_tell, line, 0), _device(), shared=shared).model_dump_json()


def _device() -> torch.device:
    """What Ray gave this process."""
    return torch.device("cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu")


def _tell(line: Any, trial: int, news: BaseModel) -> None:
    told = TrialNews(trial=trial, news=news)  # type: ignore[arg-type]
    ray.get(line.put.remote(told.model_dump_json()))
