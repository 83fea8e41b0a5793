"""Training of one experiment on a group of Ray Train workers: start, restart, stop and result of the group.

One worker group trains all stages of the run. The run's folder contains the checkpoint (see `zscl.sequence.run`), from
which a restarted worker group, or a later start of the same run, resumes. Checkpoints are not reported to Ray Train. So
a run does not depend on when Ray Train stores them, and it survives a failure of Ray Train's controller.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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

from orchestrate.cluster.channel import consume_events, create_channel
from orchestrate.cluster.connect import check_resources
from orchestrate.cluster.eval_tasks import build_submitter
from orchestrate.cluster.metrics_export import export_usage
from orchestrate.cluster.storage_sync import remote_folder_url
from orchestrate.lifecycle.signals import StopRequest
from schemas.errors import ErrorCode, InputError
from schemas.events import Note, RunEvent, WorkersUsed
from schemas.experiment import Experiment
from schemas.results import EmbeddingReport, Result
from zscl.runtime.distributed import barrier, rank
from zscl.sequence.layout import CHECKPOINT, RAY_FOLDER, glob_stages
from zscl.sequence.object_store import RemoteSync, node_local_sync
from zscl.sequence.run import run_sequence
from zscl.sequence.stage_cache import SharedWork
from zscl.sequence.teacher import embed_reference
from zscl.training.checkpoint import StoppedError

log = logging.getLogger(__name__)

# The storage errors that occur again if the operation is repeated, and the advice for the user.
PERMANENT_ERRORS = {
    number: f"{advice}, and the same command resumes from the last checkpoint"
    for number, advice in (
        (errno.ENOSPC, "free space on its disk"),
        (errno.EDQUOT, "free space within the quota"),
        (errno.EROFS, "make its disk writable"),
        (errno.EACCES, "make the folder writable for the workers"),
        (errno.EPERM, "make the folder writable for the workers"),
    )
}
# These errors are permanent only in the run's folder. For a file in another folder, another machine may succeed.
FOLDER_ERRORS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})
CONTROLLER_RETRIES = 3  # Ray's default has no limit
HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
NODE_RECOVERY_SECONDS = 600  # how long each attempt to start the workers waits for a lost node to return
OnEvent = Callable[[BaseModel], None]
_run_event: TypeAdapter[Any] = TypeAdapter(RunEvent)
_STOPPED = "stopped: "  # the prefix of the message that a worker sends when it has stopped
# The functions that workers can call. The workers' arguments contain a function's name and not the function itself,
# because Ray's controller unpickles them, and would import open_clip for a function before it starts the workers.
WORK: dict[str, Callable[..., BaseModel]] = {"run": run_sequence, "embed": embed_reference}


@dataclass(frozen=True)
class WorkerJob:
    """The function that the workers of a group call, and its arguments.

    Attributes:
        work: The function's key in `WORK`.
        experiment: The run's experiment.
        folder: The run's folder.
        channel: The handle of the run's `RunChannel` actor.
        arguments: Keyword arguments that only this function takes. The other arguments are the same for all of `WORK`.
    """

    work: str
    experiment: Experiment
    folder: Path
    channel: Any
    arguments: Mapping[str, Any]


def train(
    experiment: Experiment,
    folder: Path,
    on_event: OnEvent,
    stop_request: StopRequest,
    shared: SharedWork | None = None,
    grace_seconds: float | None = None,
) -> Result:
    """Run an experiment on the connected cluster.

    Args:
        experiment: The experiment.
        folder: The run's folder.
        on_event: Called with each event, in a thread of this process.
        stop_request: Becomes true when a signal arrives. It is polled, and the workers are then requested to stop.
        shared: The caches that are shared with other runs; `None` without shared caches.
        grace_seconds: How long to wait for the workers to stop after a signal; default: `compute.grace_seconds`.

    Returns:
        The run's result.

    Raises:
        InputError: A worker found an error in the experiment's data or model, or the cluster is too small.
        InterruptedRunError: A signal arrived. The same command resumes the run.
        ray.train.TrainingFailedError: The workers failed more than `compute.max_failures` times without progress.
    """
    grace_seconds = experiment.compute.grace_seconds if grace_seconds is None else grace_seconds
    arguments = {"shared": shared}
    return Result.model_validate_json(
        _run_on_workers("run", experiment, folder, on_event, stop_request, grace_seconds, arguments)
    )


def embed(experiment: Experiment, folder: Path, on_event: OnEvent, stop_request: StopRequest) -> EmbeddingReport:
    """Compute the teacher's features for an experiment and store them in the cache. For the arguments, see `train`."""
    # The features are stored as they are computed, so a stop need not wait for the workers.
    return EmbeddingReport.model_validate_json(
        _run_on_workers("embed", experiment, folder, on_event, stop_request, 0.0, {})
    )


def _run_on_workers(
    work: str,
    experiment: Experiment,
    folder: Path,
    on_event: OnEvent,
    stop_request: StopRequest,
    grace_seconds: float,
    arguments: Mapping[str, Any],
) -> str:
    """Call a function of `WORK` on every worker of a group.

    Args:
        work: The function's key in `WORK`.
        experiment: The run's experiment.
        folder: The run's folder.
        on_event: Called with each event, in a thread of this process.
        stop_request: Becomes true when a signal arrives. It is polled, and the workers are then requested to stop.
        grace_seconds: How long to wait for the workers to stop after a signal.
        arguments: Keyword arguments that only this function takes. The other arguments are the same for all of `WORK`.

    Returns:
        The function's result on the main worker, as JSON.
    """
    channel, stopped = create_channel(), Future[str]()
    job = WorkerJob(work, experiment, folder, channel, arguments)
    with consume_events(channel, partial(_on_event, on_event, stopped)):
        # Ray runs in a thread, because in the main thread it would replace the signal handlers.
        result: Future[str] = Future()
        fit = partial(_fit_with_restarts, job, check_resources(experiment.compute))
        threading.Thread(target=_set_result, args=(result, fit), name="fit", daemon=True).start()
        return _wait_for_result(result, channel, stopped, stop_request, grace_seconds)


def _on_event(on_event: OnEvent, stopped: "Future[str]", message: str) -> None:
    if not message.startswith(_STOPPED):
        on_event(_run_event.validate_json(message))
    elif not stopped.done():  # every worker sends this message
        stopped.set_result(message.removeprefix(_STOPPED))


def _set_result(future: "Future[str]", function: Callable[[], str]) -> None:
    """Call a function, and set a future to its result or its exception."""
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _wait_for_result(
    result: "Future[str]", channel: Any, stopped: "Future[str]", stop_request: StopRequest, grace_seconds: float
) -> str:
    """Wait for the result of the workers, or for a signal. After a signal, request the workers to stop.

    Args:
        result: The future of the result.
        channel: The handle of the run's `RunChannel` actor.
        stopped: The future of a worker's message that it has stopped after a checkpoint.
        stop_request: Becomes true when a signal arrives.
        grace_seconds: How long to wait for the workers to stop after a signal.

    Returns:
        The result as JSON.

    Raises:
        InterruptedRunError: A signal arrived before the result.
    """
    while not stop_request and not result.done():
        wait([result], timeout=0.1)
    if not result.done():
        channel.request_stop.remote()
        wait([result, stopped], timeout=grace_seconds, return_when=FIRST_COMPLETED)
    if stopped.done():
        raise stop_request.to_error(f"{stopped.result()}; the same command resumes there")
    if not result.done():
        timeout = f" (no new one was written within {grace_seconds:g} s)" if grace_seconds else ""
        raise stop_request.to_error(f"the same command resumes from the last checkpoint{timeout}")
    failure = result.exception()
    if stop_request and failure is not None and not isinstance(failure, InputError):
        message = "the workers ended before they could stop; the same command resumes from the last checkpoint"
        raise stop_request.to_error(message) from failure
    return result.result()


def _fit_with_restarts(job: WorkerJob, use_gpu: bool) -> str:
    """Run a worker group and return its result. Restart a failed group if it made progress (see `_read_progress`)."""
    while True:
        progress = _read_progress(job.experiment, job.folder)
        try:
            result: str = _build_trainer(job, use_gpu).fit().return_value
            failure = None
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            failure = error
        if input_error := ray.get(job.channel.input_error.remote()):
            raise input_error from failure
        if failure is None:
            return result
        if _read_progress(job.experiment, job.folder) == progress:
            raise failure
        log.warning("The worker group failed (%s) after it had made progress; it is restarted", type(failure).__name__)


def _read_progress(experiment: Experiment, folder: Path) -> object:
    """Return a value that changes whenever the run writes a checkpoint or a result file.

    Two equal values mean that the run has made no progress.
    """
    if url := remote_folder_url(experiment, folder):
        versions = RemoteSync(url, folder).list_remote()
        return {name: version for name, version in versions.items() if name.endswith((CHECKPOINT, ".json"))}
    files = [folder / CHECKPOINT, *folder.glob("*.json"), *glob_stages(folder, "*.json")]
    return sorted((file, file.stat().st_mtime_ns) for file in files if file.is_file())


def _build_trainer(job: WorkerJob, use_gpu: bool) -> TorchTrainer:
    compute = job.experiment.compute
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if use_gpu else {})
    hang_seconds = 60 * compute.hang_minutes
    elastic = compute.min_workers is not None and compute.min_workers < compute.workers
    # Ray copies these variables to its controller.
    os.environ[HEALTH_CHECK_TIMEOUT] = str(hang_seconds)
    if not elastic:  # an elastic group would wait this long before it starts with fewer workers
        os.environ.setdefault(START_TIMEOUT, str(NODE_RECOVERY_SECONDS))
    return TorchTrainer(
        _train_loop_per_worker,
        train_loop_config={
            "work": job.work,
            "experiment": job.experiment.model_dump_json(),
            "folder": job.folder,
            "storage": remote_folder_url(job.experiment, job.folder),
            "channel": job.channel,
            "arguments": job.arguments,
        },
        scaling_config=ScalingConfig(
            num_workers=(compute.min_workers, compute.workers) if elastic else compute.workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(
            # NCCL does not support two workers on one GPU.
            backend="nccl" if use_gpu and compute.gpus_per_worker >= 1 else "gloo",
            timeout_s=max(1, round(hang_seconds)),
        ),
        run_config=RunConfig(
            name=f"{datetime.now():%Y%m%d-%H%M%S-%f}",
            **_ray_storage(job.experiment, job.folder),
            failure_config=FailureConfig(
                max_failures=compute.max_failures, controller_failure_limit=CONTROLLER_RETRIES
            ),
        ),
    )


def _ray_storage(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Return the settings of `RunConfig` for the folder of Ray Train's own files. All nodes must see this folder."""
    url = remote_folder_url(experiment, folder)
    if url is None:
        return {"storage_path": str(folder / RAY_FOLDER)}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = fsspec.core.url_to_fs(f"{url}/{RAY_FOLDER}")
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


def storage_error_advice(error: OSError, folder: Path) -> str:
    """Return a message with advice about a storage error that occurs again if the workers are restarted.

    Args:
        error: The error that a worker raised.
        folder: The run's folder. The message names it if the error has no file name (for example if the disk is full).

    Returns:
        The message; empty for an error that may not occur again.
    """
    if error.errno not in PERMANENT_ERRORS or (error.errno in FOLDER_ERRORS and not _is_error_in(folder, error)):
        return ""
    return f"{error.filename or folder}: {error.strerror}; {PERMANENT_ERRORS[error.errno]}"


def _is_error_in(folder: Path, error: OSError) -> bool:
    """Return whether an error refers to a file in a folder, or has no file name."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return not names or any(Path(name).resolve().is_relative_to(folder.resolve()) for name in names)


class EventLogHandler(logging.Handler):
    """Log handler that reports a worker's warnings, for example about retries of storage, as events of the run.

    The data loader's processes, which are forked, inherit the handler. In forked processes, calls to Ray hang, so
    warnings are written to standard error, which Ray logs.
    """

    def __init__(self, report: OnEvent) -> None:
        super().__init__(logging.WARNING)
        self._report = report
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Report a log record as an event. In a forked process, write it to standard error."""
        if os.getpid() != self._process:
            if logging.lastResort:
                logging.lastResort.handle(record)
            return
        with suppress(Exception):  # the channel may be closed already
            self._report(Note(text=record.getMessage()))


def _train_loop_per_worker(config: dict[str, Any]) -> str:
    """Call the job's function. Ray Train calls this function on every worker.

    Args:
        config: The job; see `train_loop_config` in `_build_trainer`.

    Returns:
        The result as JSON; empty if the workers were stopped, or if a worker has already found invalid input.

    Raises:
        InputError: The user's input is invalid. The error is also reported to the channel.
        OSError: The storage failed.
    """
    channel, folder = config["channel"], config["folder"]

    def report(event: BaseModel) -> None:
        if isinstance(event, WorkersUsed):
            export_usage(config["folder"].name, event)
        ray.get(channel.put.remote(event.model_dump_json()))

    logging.getLogger("zscl").addHandler(EventLogHandler(report))
    if ray.get(channel.input_error.remote()):  # Ray has restarted the group, which would fail again
        return ""
    experiment, device = Experiment.model_validate_json(config["experiment"]), get_device()
    arguments = dict(config["arguments"])
    try:
        with _synced_node_folder(config["storage"]) as sync:
            if sync:
                folder, arguments["sync"] = sync.folder, sync
            if config["work"] == "run" and experiment.compute.evaluation == "overlapped":
                submit = build_submitter(experiment, folder, device.type == "cuda", channel, sync)
                arguments["submit_evaluation"] = submit
            result = WORK[config["work"]](
                experiment,
                folder,
                report=report,
                device=device,
                stop_requested=lambda: ray.get(channel.stop_requested.remote()),
                **arguments,
            )
    except StoppedError as stop:
        ray.get(channel.put.remote(f"{_STOPPED}{stop}"))
        return ""
    except InputError as error:
        # Create a plain InputError, because a subclass may not be picklable.
        ray.get(channel.report_input_error.remote(InputError(str(error), code=error.code, field=error.field)))
        raise
    except OSError as error:
        if message := storage_error_advice(error, folder):
            code = ErrorCode.NO_SPACE if error.errno in NO_SPACE_ERRORS else ErrorCode.NOT_WRITABLE
            ray.get(channel.report_input_error.remote(InputError(message, code=code)))
        raise
    return result.model_dump_json()


@contextmanager
def _synced_node_folder(storage: str | None) -> Iterator[RemoteSync | None]:
    """Context manager: download a run's folder from object storage to this node on entry.

    On exit, the main worker uploads the folder.

    Yields:
        The object that copies the folder to and from object storage; `None` if no storage is configured.
    """
    if storage is None:
        yield None
        return
    sync = node_local_sync(storage)
    sync.pull(exact=True)  # one worker of the node downloads, the others wait
    barrier()
    try:
        yield sync
    finally:
        if rank() == 0:
            sync.push()
