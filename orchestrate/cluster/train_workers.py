"""One experiment on N Ray Train workers.

One worker group runs the whole sequence. The run's folder is its own checkpoint (see `zscl.sequence.run`): a restarted
worker group, or a later start of the same run, goes on from what is there. Ray is handed no checkpoints, so nothing
depends on when it commits them, and its controller may die as well as a worker.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
from pydantic import BaseModel, TypeAdapter
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from orchestrate.cluster.channel import consume_events, open_channel
from orchestrate.cluster.connect import check_resources
from orchestrate.cluster.eval_tasks import submit_to_ray
from orchestrate.cluster.metrics_export import export_usage
from orchestrate.cluster.storage_sync import remote_folder_url
from orchestrate.lifecycle.signals import StopRequest
from schemas.errors import InputError
from schemas.events import Note, Progress, WorkersUsed
from schemas.experiment import Experiment
from schemas.results import Embedded, Result
from zscl.runtime.distributed import barrier, rank
from zscl.sequence.object_store import RemoteSync, node_local_folder
from zscl.sequence.run import run_sequence
from zscl.sequence.stage_cache import SharedWork
from zscl.sequence.teacher import embed_reference
from zscl.training.checkpoint import CHECKPOINT, StoppedError

log = logging.getLogger(__name__)

# Errors of storage that another attempt meets again, and what to do.
LASTING = {
    number: f"{what}, and the same command goes on from the last checkpoint"
    for number, what in (
        (errno.ENOSPC, "make room on its disk"),
        (errno.EDQUOT, "make room within the quota"),
        (errno.EROFS, "have its disk writable"),
        (errno.EACCES, "have the folder writable for the workers"),
        (errno.EPERM, "have the folder writable for the workers"),
    )
}
# Of a file outside the run's folder they may be those of one machine, whose work another can do.
OF_THE_FOLDER = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
CONTROLLER_RETRIES = 3  # Ray's default is to try for ever
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
NODE_SECONDS = 600  # that a lost node may take to come back, each of the controller's tries
OnProgress = Callable[[BaseModel], None]
_progress: TypeAdapter[Any] = TypeAdapter(Progress)
_STOPPED = "stopped: "
# By name: Ray's controller unpickles what its workers get, and for a function of ours it would import all of open_clip
# before it starts them.
WORK: dict[str, Callable[..., BaseModel]] = {"run": run_sequence, "embed": embed_reference}


def train(
    experiment: Experiment,
    folder: Path,
    on_progress: OnProgress,
    interruption: StopRequest,
    shared: SharedWork | None = None,
    grace_seconds: float | None = None,
) -> Result:
    """Run an experiment on the cluster that `connect` chose.

    Args:
        experiment: what to run.
        folder: the run's.
        on_progress: called in a thread of this process.
        interruption: looked at, for the wish to stop.
        shared: with runs beside this one.
        grace_seconds: to wait for the workers to stop; default: what the experiment says.

    Raises:
        InputError: a worker found something wrong with the experiment's data or model.
        InterruptedRunError: a signal asked for the end; the folder holds what it takes to go on.
        ray.train.TrainingFailedError: workers failed, compute.max_failures times without having come further.
    """
    grace_seconds = experiment.compute.grace_seconds if grace_seconds is None else grace_seconds
    given = {"shared": shared}
    return Result.model_validate_json(
        _on_workers("run", experiment, folder, on_progress, interruption, grace_seconds, given)
    )


def embed(experiment: Experiment, folder: Path, on_progress: OnProgress, interruption: StopRequest) -> Embedded:
    """Fill the teacher's stores for an experiment; as `train` otherwise."""
    # What is embedded is stored as it goes: there is nothing to wait for.
    return Embedded.model_validate_json(_on_workers("embed", experiment, folder, on_progress, interruption, 0.0, {}))


def _on_workers(
    work: str,
    experiment: Experiment,
    folder: Path,
    on_progress: OnProgress,
    interruption: StopRequest,
    grace_seconds: float,
    given: Mapping[str, Any],
) -> str:
    """Call one of `WORK` on every worker of a group. Returns the main worker's answer, as JSON."""
    line, stopped = open_channel(), Future[str]()
    with consume_events(line, partial(_hear, on_progress, stopped)):
        # In a thread of its own, for in the main one Ray would take the signals.
        answer: Future[str] = Future()
        fitting = partial(_fit, work, experiment, folder, line, check_resources(experiment.compute), given)
        threading.Thread(target=_settle, args=(answer, fitting), name="fit", daemon=True).start()
        return _wait(answer, line, stopped, interruption, grace_seconds)


def _hear(on_progress: OnProgress, stopped: "Future[str]", message: str) -> None:
    if not message.startswith(_STOPPED):
        on_progress(_progress.validate_json(message))
    elif not stopped.done():  # every worker says so
        stopped.set_result(message.removeprefix(_STOPPED))


def _settle(answer: "Future[str]", function: Callable[[], str]) -> None:
    try:
        answer.set_result(function())
    except BaseException as error:
        answer.set_exception(error)


def _wait(
    answer: "Future[str]", line: Any, stopped: "Future[str]", interruption: StopRequest, grace_seconds: float
) -> str:
    """Wait for the workers' answer; after a signal, for them to stop where they can go on, if that is soon.

    Raises:
        InterruptedRunError: a signal came before the answer.
        Exception: what the workers failed with.
    """
    while not interruption and not answer.done():
        wait([answer], timeout=0.1)
    if not answer.done():
        line.ask_to_stop.remote()
        wait([answer, stopped], timeout=grace_seconds, return_when=FIRST_COMPLETED)
    if stopped.done():
        raise interruption.error(f"{stopped.result()}; the same command goes on there")
    if not answer.done():
        waited = f" (no other came within {grace_seconds:g} s)" if grace_seconds else ""
        raise interruption.error(f"the same command goes on from what was kept last{waited}")
    failure = answer.exception()
    if interruption and failure is not None and not isinstance(failure, InputError):
        raise interruption.error("the workers ended first; the same command goes on from what was kept") from failure
    return answer.result()


def _fit(work: str, experiment: Experiment, folder: Path, line: Any, use_gpu: bool, given: Mapping[str, Any]) -> str:
    """Fit until there is an answer, anew as long as what failed had come further."""
    while True:
        name = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
        before = _reached(experiment, folder)
        try:
            answer: str = _trainer(work, experiment, folder, line, use_gpu, given, name).fit().return_value
            failure = None
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            failure = error
        if refusal := ray.get(line.refused.remote()):
            raise InputError(refusal) from failure
        if failure is None:
            return answer
        if _reached(experiment, folder) == before:
            raise failure
        log.warning("The worker group failed (%s); it had come further, so it starts again", type(failure).__name__)


def _reached(experiment: Experiment, folder: Path) -> object:
    """What tells how far a run has come."""
    if url := remote_folder_url(experiment, folder):
        tells = (CHECKPOINT, ".json")
        return {name: version for name, version in RemoteSync(url, folder).versions().items() if name.endswith(tells)}
    found = [folder / CHECKPOINT, *folder.glob("*.json"), *folder.glob("stages/*/*.json")]
    return sorted((file, file.stat().st_mtime_ns) for file in found if file.is_file())


def _trainer(
    work: str, experiment: Experiment, folder: Path, line: Any, use_gpu: bool, given: Mapping[str, Any], name: str
) -> TorchTrainer:
    compute = experiment.compute
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if use_gpu else {})
    patience = 60 * compute.hang_minutes
    elastic = compute.min_workers is not None and compute.min_workers < compute.workers
    # Ray hands these on to its controller.
    os.environ[HEALTH_CHECK_TIMEOUT] = str(patience)
    if not elastic:  # which would take this long to begin with fewer
        os.environ.setdefault(START_TIMEOUT, str(NODE_SECONDS))
    return TorchTrainer(
        _work,
        train_loop_config={
            "work": work,
            "experiment": experiment.model_dump_json(),
            "folder": folder,
            "storage": remote_folder_url(experiment, folder),
            "line": line,
            "given": given,
        },
        scaling_config=ScalingConfig(
            num_workers=(compute.min_workers, compute.workers) if elastic else compute.workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(
            # NCCL refuses two workers on one GPU.
            backend="nccl" if use_gpu and compute.gpus_per_worker >= 1 else "gloo",
            timeout_s=max(1, round(patience)),
        ),
        run_config=RunConfig(
            name=name,
            **_storage_of_ray(experiment, folder),
            failure_config=FailureConfig(
                max_failures=compute.max_failures, controller_failure_limit=CONTROLLER_RETRIES
            ),
        ),
    )


def _storage_of_ray(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Where Ray keeps what it writes of a group: little, but all nodes must see it."""
    url = remote_folder_url(experiment, folder)
    if url is None:
        return {"storage_path": str(folder / "ray")}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(f"{url}/ray")
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def what_to_do(error: OSError, folder: Path) -> str:
    """Say what the user can do about an error of storage that another attempt would meet again.

    Args:
        error: of a worker.
        folder: the run's, where the error names no file: a full disk does not.

    Returns:
        A sentence, or nothing for another error.
    """
    if error.errno not in LASTING or (error.errno in OF_THE_FOLDER and not _names_file_in(folder, error)):
        return ""
    return f"{error.filename or folder}: {error.strerror}; {LASTING[error.errno]}"


def _names_file_in(folder: Path, error: OSError) -> bool:
    """Whether an error is of a file in a folder. One that names no file counts as such."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return not names or any(Path(name).resolve().is_relative_to(folder.resolve()) for name in names)


class _Noted(logging.Handler):
    """Shows what is logged in a worker, a retry of storage say, as a note of the run.

    Loader processes inherit the handler when they are forked. Ray's client does not work in a forked process: a call
    there never returns. They write to their standard error instead, which Ray logs.
    """

    def __init__(self, report: OnProgress) -> None:
        super().__init__(logging.WARNING)
        self._report = report
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Report a line."""
        if os.getpid() != self._process:
            if logging.lastResort:
                logging.lastResort.handle(record)
            return
        with suppress(Exception):  # who listens may be gone
            self._report(Note(text=record.getMessage()))


def _work(config: dict[str, Any]) -> str:
    """What every worker runs. Returns nothing where the group was stopped, or its input refused."""
    line = config["line"]

    def report(progress: BaseModel) -> None:
        if isinstance(progress, WorkersUsed):
            export_usage(config["folder"].name, progress)
        ray.get(line.put.remote(progress.model_dump_json()))

    logging.getLogger("zscl").addHandler(_Noted(report))
    if ray.get(line.refused.remote()):  # the group was restarted; what was wrong with the input still is
        return ""
    experiment, device, given = Experiment.model_validate_json(config["experiment"]), get_device(), config["given"]
    folder = config["folder"]
    try:
        with _on_this_node(config["storage"]) as mirror:
            if mirror:
                folder, given = mirror.folder, given | {"mirror": mirror}
            if config["work"] == "run" and experiment.compute.evaluation == "overlapped":
                given = given | {"elsewhere": submit_to_ray(experiment, folder, device.type == "cuda", line, mirror)}
            answer = WORK[config["work"]](
                experiment,
                folder,
                report=report,
                device=device,
                asked_to_stop=lambda: ray.get(line.asked_to_stop.remote()),
                **given,
            )
    except StoppedError as stop:
        ray.get(line.put.remote(f"{_STOPPED}{stop}"))
        return ""
    except InputError as error:
        ray.get(line.refuse.remote(str(error)))
        raise
    except OSError as error:
        if sentence := what_to_do(error, folder):
            ray.get(line.refuse.remote(sentence))
        raise
    return answer.model_dump_json()


@contextmanager
def _on_this_node(storage: str | None) -> Iterator[RemoteSync | None]:
    """This node's folder of a run that is kept in storage: as it is there, and there as the main worker leaves it."""
    if storage is None:
        yield None
        return
    mirror = node_local_folder(storage)
    mirror.pull(exactly=True)  # those of one node after each other
    barrier()
    try:
        yield mirror
    finally:
        if rank() == 0:
            mirror.push()
