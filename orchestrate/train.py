"""One experiment on N Ray Train workers.

One worker group runs the whole sequence. The run's folder is its own checkpoint (see `zscl.sequence`): a restarted
worker group, or a later start of the same run, goes on behind the last finished stage. Ray's own reports carry
metrics only, so nothing depends on when Ray commits them.
"""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from pydantic import BaseModel, TypeAdapter
from ray.exceptions import AuthenticationError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from orchestrate.access import loopback_alone, use_token
from schemas.base import InputError
from schemas.compute import Compute
from schemas.experiment import Experiment
from schemas.results import Embedded, Progress, Result
from zscl.files import write_text
from zscl.sequence import run_sequence
from zscl.teaching import embed_reference

log = logging.getLogger(__name__)

CONTROLLER_RETRIES = 3  # Ray's default is to try for ever
OnProgress = Callable[[BaseModel], None]
_progress: TypeAdapter[Any] = TypeAdapter(Progress)
_END = ""


def connect(compute: Compute, note: Callable[[str], None]) -> None:
    """Connect to the recipe's cluster, to the one of RAY_ADDRESS, or start a local one; `note` is told which.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    starts_here = compute.address is None and "RAY_ADDRESS" not in os.environ
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if starts_here else {}
    note("starting Ray on this machine" if starts_here else "connecting to the Ray cluster")
    use_token(starts_here)
    address = "local" if starts_here else compute.address  # never what somebody else may have started beside us
    try:
        with loopback_alone() if starts_here else nullcontext():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise InputError(
            f"compute.address: found no Ray cluster at {compute.address or os.environ.get('RAY_ADDRESS')} "
            f"({' '.join(str(error).split())[:160]}), expected HOST:PORT of a running one, or none to start one here"
        ) from error


def check_resources(compute: Compute) -> bool:
    """Tell whether the workers get GPUs.

    Raises:
        InputError: the cluster cannot hold the workers.
    """
    cluster = ray.cluster_resources()
    gpus = cluster.get("GPU", 0.0)
    use_gpu = compute.device == "gpu" or (compute.device == "auto" and gpus > 0)
    wanted = {"CPU": compute.workers * compute.cpus_per_worker}
    if use_gpu:
        wanted["GPU"] = compute.workers * compute.gpus_per_worker
    for kind, amount in wanted.items():
        if amount > cluster.get(kind, 0.0):
            raise InputError(
                f"compute.workers: {compute.workers} workers need {amount:g} {kind}s, found {cluster.get(kind, 0.0):g} "
                "in the Ray cluster; expected fewer workers, less for each, or a larger cluster"
            )
    return use_gpu


def train(experiment: Experiment, folder: Path, on_progress: OnProgress) -> Result:
    """Run an experiment on the cluster that `connect` chose; `on_progress` is called in a thread of this process.

    Raises:
        InputError: a worker found something wrong with the experiment's data or model.
        ray.train.TrainingFailedError: a worker failed more often than compute.max_failures.
    """
    return Result.model_validate_json(_on_workers(run_sequence, experiment, folder, on_progress))


def embed(experiment: Experiment, folder: Path, on_progress: OnProgress) -> Embedded:
    """Fill the teacher's stores for an experiment; as `train` otherwise."""
    return Embedded.model_validate_json(_on_workers(embed_reference, experiment, folder, on_progress))


def _on_workers(work: Callable[..., BaseModel], experiment: Experiment, folder: Path, on_progress: OnProgress) -> str:
    """Call a function of `zscl.sequence` on every worker of a group. Returns the main worker's answer, as JSON."""
    use_gpu = check_resources(experiment.compute)
    compute = experiment.compute
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if use_gpu else {})
    name = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    refusal = folder / "ray" / name / "refused"
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "work": work,
            "experiment": experiment.model_dump_json(),
            "folder": folder,
            "queue": queue,
            "refusal": refusal,
        },
        scaling_config=ScalingConfig(num_workers=compute.workers, use_gpu=use_gpu, resources_per_worker=resources),
        # NCCL refuses two workers on one GPU.
        torch_config=TorchConfig(backend="nccl" if use_gpu and compute.gpus_per_worker >= 1 else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(
                max_failures=compute.max_failures, controller_failure_limit=CONTROLLER_RETRIES
            ),
        ),
    )
    returned = ""
    with _listening(queue, on_progress):
        try:
            returned = trainer.fit().return_value
        except ray.train.WorkerGroupError:
            if not refusal.is_file():
                raise
    if refusal.is_file():
        raise InputError(refusal.read_text())
    return returned


def _work(config: dict[str, Any]) -> str:
    """What every worker runs."""

    def report(progress: BaseModel) -> None:
        config["queue"].put(progress.model_dump_json())

    if config["refusal"].is_file():  # the group was restarted; what was wrong with the input still is
        return ""
    try:
        answer: BaseModel = config["work"](
            Experiment.model_validate_json(config["experiment"]),
            config["folder"],
            report=report,
            device=ray.train.torch.get_device(),
        )
    except InputError as error:
        write_text(config["refusal"], str(error))
        raise
    return answer.model_dump_json()


@contextmanager
def _listening(queue: Queue, on_progress: OnProgress) -> Iterator[None]:
    """Hand on what the workers report, from a thread, until the block ends.

    Nothing that goes wrong with a display or a record may stop the training: it is logged.
    """

    def listen() -> None:
        while (message := queue.get()) != _END:
            try:
                on_progress(_progress.validate_json(message))
            except Exception:
                log.exception("Progress could not be shown or recorded; the run goes on")

    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        try:
            yield
        finally:
            queue.put(_END)
            listening.result()
            queue.shutdown()
