"""Connection to a Ray cluster, start of a local one, and checks that a cluster has the resources of a run."""

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

from orchestrate.cluster.address import ADDRESS_VARIABLE, check_gcs, cluster_address
from orchestrate.cluster.auth import bind_to_loopback, enable_token_auth
from orchestrate.lifecycle.signals import defer_warning_signals, exit_on_signals
from schemas.compute import Compute
from schemas.errors import ErrorCode, InputError, one_line
from zscl.runtime.atomic_io import remove_if_possible

# Settings of the C library's memory allocator. By default, the allocator returns the freed memory of a thread, such as
# the one in which Ray trains, to the system at once. A step on a CPU would spend a sixth of its time on allocating the
# memory again. Ray's processes inherit these variables when Ray is started.
MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**26),
}
# The path of a Unix socket may have 107 bytes on Linux and 103 bytes on macOS. Ray appends up to 68 bytes to the
# temporary folder's path, for example /ray/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store
MAX_TEMP_BYTES = 107 - 68 if sys.platform == "linux" else 103 - 68
MAX_PID_DIGITS = 7
NODE_CHECK_SECONDS = 60.0  # how long to wait until a node has started a process and answered


def has_cluster_address(compute: Compute) -> bool:
    """Return whether the recipe or the environment contains the address of a cluster."""
    return cluster_address(compute) is not None


def connect(compute: Compute, note: Callable[[str], None]) -> None:
    """Connect to the configured Ray cluster, or start a local one. Do nothing if this process is already connected.

    Args:
        compute: The recipe's section `compute`.
        note: Called with a message for the user before this process connects or starts a cluster.

    Raises:
        InputError: No cluster answers at the configured address, or a local cluster cannot be started.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    address = cluster_address(compute)
    if address is None:
        _start_local(note)
    else:
        _join(address, compute, note)
    exit_on_signals()


def _join(address: str, compute: Compute, note: Callable[[str], None]) -> None:
    """Connect to a running cluster. Raise `InputError` if none answers, or if the cluster rejects this process."""
    note("connecting to the Ray cluster")
    field = "compute.address" if compute.address == address else ADDRESS_VARIABLE
    check_gcs(address, field)
    enable_token_auth(starts_cluster=False)
    try:
        with defer_warning_signals():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise InputError(
            f"{field}: cannot join the Ray cluster at {address} ({one_line(error)}). Give HOST:PORT of a cluster that "
            "this machine belongs to, or no address to start a local Ray",
            code=ErrorCode.REJECTED if isinstance(error, AuthenticationError) else ErrorCode.UNREACHABLE,
            field=field,
        ) from error


def _start_local(note: Callable[[str], None]) -> None:
    """Start a Ray cluster on this machine. Raise `InputError` if Ray cannot write its files."""
    from joblib import cpu_count  # respects CPU affinity and the limits of a container

    cores, folder = cpu_count(), ray_temp_folder()
    limit = (
        f", with {cores} of {os.cpu_count()} CPU cores (the limit of this process)" if cores != os.cpu_count() else ""
    )
    note(f"starting Ray on this machine{limit}")
    enable_token_auth(starts_cluster=True)
    for name, value in MALLOC_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        with defer_warning_signals(), bind_to_loopback():
            ray.init(
                address="local",  # do not connect to a cluster that another user has started on this machine
                num_cpus=cores,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
    except OSError as error:
        raise InputError(
            f"RAY_TMPDIR: cannot start Ray with its files in {folder} ({error}), expected a writable folder on a local "
            f"disk, with a path of at most {MAX_TEMP_BYTES} bytes",
            code=ErrorCode.NOT_WRITABLE,
            field="RAY_TMPDIR",
        ) from error


def ray_temp_folder() -> str:
    """Return the folder for the files of a local Ray cluster.

    As in Ray, this is the subfolder `ray` of RAY_TMPDIR or TMPDIR. The path must be short, because Ray creates Unix
    sockets in the folder. If the path in TMPDIR is too long or not writable, /tmp is used instead.

    Returns:
        An absolute path.

    Raises:
        InputError: The path in RAY_TMPDIR is too long.
    """
    ray_tmpdir, tmpdir = os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR") or "/tmp"
    if ray_tmpdir:
        folder = Path(ray_tmpdir).absolute()
        # The name of the session's folder contains the process ID. If this ID is short, the path may be longer.
        size, limit = len(os.fsencode(folder)), MAX_TEMP_BYTES + MAX_PID_DIGITS - len(str(os.getpid()))
        if size > limit:
            raise InputError(
                f"RAY_TMPDIR: found {folder}, {size} bytes long, expected at most {limit}, because the system limits "
                "the length of the paths of Ray's Unix sockets in it",
                code=ErrorCode.INVALID_VALUE,
                field="RAY_TMPDIR",
            )
        return str(folder / "ray")
    is_usable = len(os.fsencode(tmpdir)) <= MAX_TEMP_BYTES and os.access(tmpdir, os.W_OK | os.X_OK)
    return str(Path(tmpdir if is_usable else "/tmp", "ray").absolute())


def count_concurrent_runs(compute: Compute) -> int:
    """Return how many runs with these settings the cluster can run at once. Raise `InputError` if it is too small."""
    required = {"CPU": compute.workers * compute.cpus_per_worker}
    if check_resources(compute):
        required["GPU"] = compute.workers * compute.gpus_per_worker
    cluster = ray.cluster_resources()
    return max(1, min(int(cluster.get(kind, 0.0) / amount + 1e-9) for kind, amount in required.items()))


def local_resources() -> dict[str, float]:
    """Return the numbers of CPUs and GPUs of the connected cluster or, without a connection, of this machine."""
    if ray.is_initialized():
        return {kind: ray.cluster_resources().get(kind, 0.0) for kind in ("CPU", "GPU")}
    from joblib import cpu_count

    return {"CPU": float(cpu_count()), "GPU": float(torch.cuda.device_count())}


def check_resources(compute: Compute, cluster: Mapping[str, float] | None = None) -> bool:
    """Check that a cluster has enough resources for a run's workers, and return whether the workers use GPUs.

    Args:
        compute: The recipe's section `compute`. If `min_workers` is set, the cluster must have the resources for this
            number of workers, otherwise for `workers`.
        cluster: The cluster's resources, by Ray's names `CPU` and `GPU`; default: those of the connected cluster.

    Returns:
        Whether the workers use GPUs.

    Raises:
        InputError: The cluster has too few CPUs or GPUs.
    """
    cluster = ray.cluster_resources() if cluster is None else cluster
    use_gpu = compute.device == "gpu" or (compute.device == "auto" and cluster.get("GPU", 0.0) > 0)
    field, workers = (
        ("workers", compute.workers) if compute.min_workers is None else ("min_workers", compute.min_workers)
    )
    evaluators = int(compute.evaluation == "overlapped")
    required = {"CPU": (workers + evaluators) * compute.cpus_per_worker}
    if use_gpu:
        required["GPU"] = (workers + evaluators) * compute.gpus_per_worker
    evaluator = " and one evaluation task (compute.evaluation: overlapped)" if evaluators else ""
    for kind, amount in required.items():
        if amount > cluster.get(kind, 0.0):
            subject = "1 worker" if workers == 1 else f"{workers} workers"
            resources = f"{amount:g} {kind}{'' if amount == 1 else 's'}"
            cpu_option = "compute.device=cpu, " if kind == "GPU" else ""
            raise InputError(
                f"compute.{field}: {subject}{evaluator} would need {resources}, found {cluster.get(kind, 0.0):g} in "
                f"the Ray cluster; expected fewer workers, fewer {kind}s per worker, {cpu_option}or a larger cluster",
                code=ErrorCode.NO_RESOURCES,
                field=f"compute.{field}",
            )
    return use_gpu


def check_shared_folder(folder: Path) -> None:
    """Check that all nodes of the cluster that have CPUs share a folder.

    Each node creates a file in the folder, and this process checks that the file exists.

    Args:
        folder: The run's folder.

    Raises:
        InputError: A node does not share the folder with this machine.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0.0) > 0]
    this_node = current_node_id()
    if all(node["NodeID"] == this_node for node in nodes):
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = {node["NodeID"]: folder / f".seen-by-{node['NodeID'][:12]}" for node in nodes}
    touch_on = ray.remote(_touch).options
    try:
        answers = {
            node_id: touch_on(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
            ).remote(file)
            for node_id, file in files.items()
        }
        for node in nodes:
            reason = _get_answer(answers[node["NodeID"]])
            if reason is None:  # a timeout is accepted, because the node may be busy
                continue
            if not reason and not files[node["NodeID"]].is_file():
                reason = "this node does not see the file that it wrote"
            if reason:
                raise InputError(
                    f"{folder}: node {node['NodeManagerAddress']} does not see this folder ({reason}). Use a folder on "
                    "a file system shared by all nodes, or set compute.storage",
                    code=ErrorCode.NOT_FOUND,
                )
    finally:
        for file in files.values():
            remove_if_possible(file)


def current_node_id() -> str:
    """Return the ID of the Ray node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def _get_answer(reference: Any) -> str | None:
    """Wait for a Ray task that calls `_touch`. Return its result or its error as text; `None` after a timeout."""
    try:
        return str(ray.get(reference, timeout=NODE_CHECK_SECONDS))
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError as error:
        return one_line(error)


def _touch(file: Path) -> str:
    """Create an empty file. Return an empty string, or the reason why it could not be created."""
    try:
        file.touch()
    except OSError as error:
        return str(error)
    return ""
