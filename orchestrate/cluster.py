"""The Ray cluster that a recipe names: connect to it, and see whether it holds what is asked of it."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrate.access import loopback_alone, use_token
from orchestrate.interruption import end_on_signals, warnings_held_back
from schemas.base import InputError
from schemas.compute import Compute
from zscl.files import remove

# Workers train in a thread, whose freed memory the C library gives back at once: a step on a CPU would spend a sixth of
# its time on getting it again. Ray's processes inherit what is set when it is started.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
}
LOOK_SECONDS = 60.0  # for a node to start a process and say something


def is_named(compute: Compute) -> bool:
    """Whether the recipe or the environment names a cluster that somebody has started."""
    return compute.address is not None or "RAY_ADDRESS" in os.environ


def connect(compute: Compute, note: Callable[[str], None]) -> None:
    """Connect to the recipe's cluster, to the one of RAY_ADDRESS, or start a local one; `note` is told which.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    starts_here = not is_named(compute)
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if starts_here else {}
    note("starting Ray on this machine" if starts_here else "connecting to the Ray cluster")
    use_token(starts_here)
    if starts_here:
        for name, value in KEEP_MEMORY.items():
            os.environ.setdefault(name, value)
    address = "local" if starts_here else compute.address  # never what somebody else may have started beside us
    try:
        with warnings_held_back(), loopback_alone() if starts_here else nullcontext():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
        end_on_signals()
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise InputError(
            f"compute.address: found no Ray cluster at {compute.address or os.environ.get('RAY_ADDRESS')} "
            f"({' '.join(str(error).split())[:160]}), expected HOST:PORT of a running one, or none to start one here"
        ) from error


def slots_of(compute: Compute) -> int:
    """How many runs of this size the cluster holds at once.

    Raises:
        InputError: not one.
    """
    wanted = {"CPU": compute.workers * compute.cpus_per_worker}
    if check_resources(compute):
        wanted["GPU"] = compute.workers * compute.gpus_per_worker
    cluster = ray.cluster_resources()
    return max(1, min(int(cluster.get(kind, 0.0) / amount + 1e-9) for kind, amount in wanted.items()))


def check_resources(compute: Compute) -> bool:
    """Tell whether the workers get GPUs.

    Raises:
        InputError: the cluster cannot hold the workers, or the fewest of them that will do.
    """
    cluster = ray.cluster_resources()
    gpus = cluster.get("GPU", 0.0)
    use_gpu = compute.device == "gpu" or (compute.device == "auto" and gpus > 0)
    field, workers = (
        ("workers", compute.workers) if compute.min_workers is None else ("min_workers", compute.min_workers)
    )
    evaluators = int(compute.evaluation == "overlapped")
    wanted = {"CPU": (workers + evaluators) * compute.cpus_per_worker}
    if use_gpu:
        wanted["GPU"] = (workers + evaluators) * compute.gpus_per_worker
    beside = " and one task beside them (compute.evaluation: overlapped)" if evaluators else ""
    for kind, amount in wanted.items():
        if amount > cluster.get(kind, 0.0):
            who = "1 worker" if workers == 1 else f"{workers} workers"
            what = f"{amount:g} {kind}{'' if amount == 1 else 's'}"
            without = "compute.device=cpu, " if kind == "GPU" else ""
            raise InputError(
                f"compute.{field}: {who}{beside} would need {what}, found {cluster.get(kind, 0.0):g} in the Ray "
                f"cluster; expected fewer workers, less for each, {without}or a larger cluster"
            )
    return use_gpu


def check_folder(folder: Path) -> None:
    """See that every node that may hold a worker writes where this process reads.

    Raises:
        InputError: naming a node that does not.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0]
    own = own_node()
    if all(node["NodeID"] == own for node in nodes):
        return
    folder.mkdir(parents=True, exist_ok=True)
    marks = {node["NodeID"]: folder / f".seen-by-{node['NodeID'][:12]}" for node in nodes}
    mark_on = ray.remote(_mark).options
    try:
        asked = {
            identity: mark_on(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(identity, soft=False)
            ).remote(mark)
            for identity, mark in marks.items()
        }
        for node in nodes:
            reason = _answer(asked[node["NodeID"]])
            if reason is None:  # it is busy, not wrong
                continue
            if not reason and not marks[node["NodeID"]].is_file():
                reason = "what it writes there is not here"
            if reason:
                raise InputError(
                    f"{folder}: found node {node['NodeManagerAddress']} of the Ray cluster to share no such folder "
                    f"({reason}), expected one that all nodes see; or object storage (compute.storage)"
                )
    finally:
        for mark in marks.values():
            remove(mark)


def own_node() -> str:
    """The node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def _answer(asked: Any) -> str | None:
    try:
        return str(ray.get(asked, timeout=LOOK_SECONDS))
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError as error:
        return " ".join(str(error).split())[:160]


def _mark(file: Path) -> str:
    """Leave a file. Returns why that fails, or nothing."""
    try:
        file.touch()
    except OSError as error:
        return str(error)
    return ""
