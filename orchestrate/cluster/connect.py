"""The Ray cluster that a recipe names: connect to it, and see whether it holds what is asked of it."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrate.cluster.address import ADDRESS, check_gcs, named_address
from orchestrate.cluster.auth import bind_to_loopback, use_token
from orchestrate.lifecycle.signals import defer_warning_signals, end_on_signals
from schemas.compute import Compute
from schemas.errors import InputError
from zscl.runtime.atomic_io import remove_quietly

# Workers train in a thread, whose freed memory the C library gives back at once: a step on a CPU would spend a sixth of
# its time on getting it again. Ray's processes inherit what is set when it is started.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
}
# Of a path to a Unix socket, Linux takes 107 bytes and macOS 103; Ray adds up to 68 to the temporary folder's name:
# /ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store
LONGEST_TEMPORARY = 107 - 68 if sys.platform == "linux" else 103 - 68
LONGEST_PID = 7  # digits
LOOK_SECONDS = 60.0  # for a node to start a process and say something


def names_cluster(compute: Compute) -> bool:
    """Whether the recipe or the environment names a cluster that somebody has started."""
    return named_address(compute) is not None


def connect(compute: Compute, note: Callable[[str], None]) -> None:
    """Connect to the recipe's cluster, to the one of RAY_ADDRESS, or start a local one; `note` is told which.

    Raises:
        InputError: there is no cluster at the address, or none can be started here.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    address = named_address(compute)
    if address is None:
        _start(note)
    else:
        _join(address, compute, note)
    end_on_signals()


def _join(address: str, compute: Compute, note: Callable[[str], None]) -> None:
    note("connecting to the Ray cluster")
    field = "compute.address" if compute.address == address else ADDRESS
    check_gcs(address, field)
    use_token(starts_here=False)
    try:
        with defer_warning_signals():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise InputError(
            f"{field}: found no Ray cluster at {address} that takes this process ({' '.join(str(error).split())}), "
            "expected HOST:PORT of a running one that this machine is a node of, or none to start one here"
        ) from error


def _start(note: Callable[[str], None]) -> None:
    from joblib import cpu_count  # with regard to CPU affinity and to the limits of a container

    cores, folder = cpu_count(), local_folder()
    some = f", with the {cores} of its {os.cpu_count()} CPU cores that it may use" if cores != os.cpu_count() else ""
    note(f"starting Ray on this machine{some}")
    use_token(starts_here=True)
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    try:
        with defer_warning_signals(), bind_to_loopback():
            ray.init(
                address="local",  # never what somebody else may have started beside us
                num_cpus=cores,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
    except OSError as error:
        raise InputError(
            f"RAY_TMPDIR: cannot start Ray with its files in {folder} ({error}), expected it to name a folder on a "
            f"local disk that can be written, in at most {LONGEST_TEMPORARY} bytes"
        ) from error


def local_folder() -> str:
    """The folder that a Ray of this machine keeps its files in; Unix sockets lie below it, whose paths must be short.

    It is Ray's own choice, `ray` in RAY_TMPDIR or TMPDIR; where TMPDIR is too long, or cannot be written, in /tmp.

    Raises:
        InputError: RAY_TMPDIR is too long.
    """
    chosen, given = os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR") or "/tmp"
    if chosen:
        folder = Path(chosen).absolute()
        # The session's folder is named after this process, whose number may be shorter than the longest one.
        size, longest = len(os.fsencode(folder)), LONGEST_TEMPORARY + LONGEST_PID - len(str(os.getpid()))
        if size > longest:
            raise InputError(
                f"RAY_TMPDIR: found {folder}, {size} bytes long, expected at most {longest}: Ray's Unix sockets lie "
                "below it, whose paths the system limits"
            )
        return str(folder / "ray")
    usable = len(os.fsencode(given)) <= LONGEST_TEMPORARY and os.access(given, os.W_OK | os.X_OK)
    return str(Path(given if usable else "/tmp", "ray").absolute())


def worker_resources(compute: Compute) -> int:
    """How many runs of this size the cluster holds at once.

    Raises:
        InputError: not one.
    """
    wanted = {"CPU": compute.workers * compute.cpus_per_worker}
    if check_resources(compute):
        wanted["GPU"] = compute.workers * compute.gpus_per_worker
    cluster = ray.cluster_resources()
    return max(1, min(int(cluster.get(kind, 0.0) / amount + 1e-9) for kind, amount in wanted.items()))


def resources_here() -> dict[str, float]:
    """Return what Ray would find on this machine, or has found."""
    if ray.is_initialized():
        return {kind: ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}
    from joblib import cpu_count

    return {"CPU": float(cpu_count()), "GPU": float(torch.cuda.device_count())}


def check_resources(compute: Compute, cluster: Mapping[str, float] | None = None) -> bool:
    """Tell whether the workers get GPUs.

    Args:
        compute: what is asked for.
        cluster: what there is; default: what the cluster that this process is connected to has.

    Raises:
        InputError: the cluster cannot hold the workers, or the fewest of them that will do.
    """
    cluster = ray.cluster_resources() if cluster is None else cluster
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
            remove_quietly(mark)


def own_node() -> str:
    """The node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def _answer(asked: Any) -> str | None:
    try:
        return str(ray.get(asked, timeout=LOOK_SECONDS))
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError as error:
        return " ".join(str(error).split())


def _mark(file: Path) -> str:
    """Leave a file. Returns why that fails, or nothing."""
    try:
        file.touch()
    except OSError as error:
        return str(error)
    return ""
