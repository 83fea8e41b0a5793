"""Checks of `zscl run --dry-run`: everything that could make a run fail in its first minute."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from orchestrate.cluster.storage_sync import remote_folder_url
from orchestrate.lifecycle.lock import owner_message
from orchestrate.lifecycle.paths import check_writable, sqlite_file, tracking_uri
from orchestrate.runs import preflight
from orchestrate.tracking.local_store import artifact_folder
from schemas.compute import Compute
from schemas.dataset_report import Manifest
from schemas.errors import ErrorCode, InputError
from schemas.experiment import Experiment
from schemas.redaction import mask
from zscl.data.task import MANIFEST, TaskFolder, read_text
from zscl.sequence.layout import RESULT, lock_file
from zscl.sequence.object_store import RemoteSync
from zscl.sequence.resolve import ResolvedExperiment

HASH_SECONDS = 5.0  # time limit for hashing shards, of all tasks together
TIMEOUT_SECONDS = 20.0  # time limit for the response of a tracking server or of object storage
T = TypeVar("T")
ConnectCluster = Callable[[], Mapping[str, float]]  # connects to a Ray cluster, checks it and returns its resources


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: Name of the check, for example `disk`.
        status: Whether the check passed, failed, or was skipped because it does not apply.
        detail: For a passed check, the result; for a skipped check, the reason; for a failed check, the error message.
    """

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.status} ({self.detail})" if self.detail else f"{self.name}: {self.status}"


class SkippedError(Exception):
    """Raised by a check that does not apply. The message gives the reason."""


@dataclass
class Checklist:
    """Runs checks and collects their outcomes.

    Attributes:
        checks: The outcomes, in the order of the checks.
    """

    checks: list[Check] = field(default_factory=list)

    def add(self, name: str, check: Callable[[], str]) -> None:
        """Run a check and append its outcome.

        Args:
            name: Name of the check, for example `disk`.
            check: Function that performs the check and returns the result as text. It raises `SkippedError` if the
                check does not apply, and `InputError` if the check fails.
        """
        try:
            self.checks.append(Check(name, "ok", mask(check())))
        except SkippedError as reason:
            self.checks.append(Check(name, "skipped", mask(str(reason))))
        except InputError as error:
            self.checks.append(Check(name, "failed", mask(str(error))))

    @property
    def lines(self) -> list[str]:
        """The outcomes as text, one line per check."""
        return list(map(str, self.checks))

    def raise_on_failure(self, note: Callable[[str], None]) -> None:
        """Raise an error if any check failed.

        Args:
            note: If a check failed, called with one line per check before the error is raised.

        Raises:
            InputError: A check failed. The message contains the messages of all failed checks.
        """
        failures = [check.detail for check in self.checks if check.status == "failed"]
        if failures:
            for check in self.checks:  # the error's message has the details of failures
                note(f"{check.name}: failed" if check.status == "failed" else str(check))
            raise InputError("\n".join(dict.fromkeys(failures)), code=ErrorCode.FAILED)


def check_run(resolved: ResolvedExperiment, folder: Path, offline: bool, connect: ConnectCluster) -> Checklist:
    """Check what a run needs and `preflight.prepare` has not checked: shards, folders, disk, cluster and tracking.

    Args:
        resolved: The experiment.
        folder: The run's folder.
        offline: Whether the run would not be recorded in MLflow.
        connect: Function that connects to the Ray cluster. It is called only if the recipe or the environment names a
            cluster.

    Returns:
        The checks and their outcomes.
    """
    checklist = Checklist()
    if (folder / RESULT).is_file():
        checklist.add("run", lambda: "finished before, nothing is left to do")
        return checklist
    stages, model = len(resolved.tasks), preflight.model_megabytes(resolved)
    checklist.add("recipe, data and model", lambda: f"{stages} stages, a model of {model:.0f} MB")
    add_common_checks(checklist, resolved, folder, offline, connect)
    checklist.add("disk", lambda: check_disk_space(folder, preflight.megabytes_needed(resolved, folder)))
    return checklist


def add_common_checks(
    checklist: Checklist, resolved: ResolvedExperiment, folder: Path, offline: bool, connect: ConnectCluster
) -> None:
    """Run the checks that runs and searches have in common.

    Args:
        checklist: The checklist to which the outcomes are appended.
        resolved: The experiment.
        folder: Folder of the run or the search.
        offline: Whether nothing would be recorded in MLflow.
        connect: Function that connects to the Ray cluster. It is called only if the recipe or the environment names a
            cluster.
    """
    experiment = resolved.experiment
    checklist.add("shards against their manifest", lambda: _check_shards(resolved.tasks))
    checklist.add("folder", lambda: _check_folder(experiment, folder))
    checklist.add("storage", lambda: _check_storage(experiment, folder))
    checklist.add("cluster", lambda: _check_cluster(experiment.compute, connect))
    checklist.add("tracking", lambda: _check_tracking(experiment, folder, offline))


def check_disk_space(folder: Path, needed: float) -> str:
    """Check that the disk has the needed megabytes free. Return a text that states the needed and the free space."""
    preflight.check_free_disk(folder, needed)
    return f"{needed:.0f} MB needed, {preflight.megabytes_free(folder):.0f} MB free"


def _check_folder(experiment: Experiment, folder: Path) -> str:
    """Check that the run's output folders are writable, and that no other process holds the run's lock."""
    preflight.check_output_folders(experiment, folder)
    lock = lock_file(folder)
    if lock.exists():
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout as error:
            raise InputError(owner_message(folder), code=ErrorCode.IN_USE) from error
        except OSError as error:
            message = f"{lock}: cannot be locked ({error.strerror}), expected a file that this user owns"
            raise InputError(message, code=ErrorCode.NOT_WRITABLE) from error
    return f"{folder} can be written"


def _check_storage(experiment: Experiment, folder: Path) -> str:
    """Check that the run's folder in object storage can be written and read."""
    url = remote_folder_url(experiment, folder)
    if url is None:
        raise SkippedError("no compute.storage")
    with _explain_timeout("compute.storage", mask(url)):
        _call_with_timeout(lambda: RemoteSync(url, folder).check())
    return f"{mask(url)} can be written"


def _check_cluster(compute: Compute, connect: ConnectCluster) -> str:
    """Check that the cluster has the resources for the workers. If no cluster is named, check this machine instead."""
    from orchestrate.cluster.connect import check_resources, has_cluster_address, local_resources

    if has_cluster_address(compute):
        return ", ".join(f"{kind} {amount:g}" for kind, amount in connect().items())
    resources = local_resources()
    check_resources(compute, resources)
    return "this machine: " + ", ".join(f"{amount:g} {kind}s" for kind, amount in resources.items())


def _check_tracking(experiment: Experiment, folder: Path, offline: bool) -> str:
    """Check that the MLflow store responds and that the experiment in it accepts runs. Create nothing."""
    if offline:
        raise SkippedError("--offline")
    uri = tracking_uri(experiment, folder)
    file = sqlite_file(uri)
    if file is not None:
        for path in (file.parent, artifact_folder(file)):
            check_writable(path, "set tracking.uri to another store, or run with --offline")
        if not file.exists():
            return f"{mask(uri)} will be made"
        if file.is_dir() or not os.access(file, os.W_OK):
            raise InputError(
                f"tracking.uri: found {file}, which is not a writable file, expected an SQLite file that this user can "
                "write; set tracking.uri to another store, or run with --offline",
                code=ErrorCode.NOT_WRITABLE,
                field="tracking.uri",
            )
    from orchestrate.tracking.mlflow_client import check_store

    with _explain_timeout("tracking.uri", mask(uri)):
        return f"{mask(uri)}: {_call_with_timeout(lambda: check_store(uri, experiment.tracking.experiment))}"


def _check_shards(tasks: Sequence[TaskFolder]) -> str:
    """Compare local shards with their tasks' manifests: all sizes, and hashes until `HASH_SECONDS` have passed."""
    deadline = time.monotonic() + HASH_SECONDS
    listed = hashed = without_manifest = 0
    for path in dict.fromkeys(task.path for task in tasks):
        if "://" in path:
            raise SkippedError(f"{path} is remote")
        shards = list(_iter_manifest(path))
        without_manifest += not shards
        for file, size, expected in shards:
            listed += 1
            if not file.is_file():
                message = f"{file}: found no such file, but {path}/{MANIFEST} lists it"
                raise InputError(message, code=ErrorCode.NOT_FOUND)
            if file.stat().st_size != size:
                message = f"{file}: found {file.stat().st_size} bytes, expected {size} according to {path}/{MANIFEST}"
                raise InputError(message, code=ErrorCode.MISMATCH)
            digest = _hash_until(deadline, file)
            if digest is None:
                continue
            hashed += 1
            if digest != expected:
                raise InputError(
                    f"{file}: found the SHA-256 {digest}, expected {expected} according to {path}/{MANIFEST}; copy "
                    "the shard again, or delete the manifest if you changed the shard",
                    code=ErrorCode.MISMATCH,
                )
    if not listed:
        raise SkippedError(f"no task has a {MANIFEST}")
    rest = "" if hashed == listed else f", in {HASH_SECONDS:g} s; `zscl data check` checks all of them"
    missing = f"; {without_manifest} tasks have no {MANIFEST}" if without_manifest else ""
    return f"the sizes of {listed} shards, the SHA-256 of {hashed}{rest}{missing}"


def _iter_manifest(path: str) -> Iterator[tuple[Path, int, str]]:
    """Yield path, size and SHA-256 of each shard in a task's manifest, if there is a manifest."""
    text = read_text(f"{path}/{MANIFEST}")
    if text is None:
        return
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        message = f"{path}/{MANIFEST}: found no manifest ({reason}), expected zscl's own, or no such file"
        raise InputError(message, code=ErrorCode.UNREADABLE) from error
    for split, shards in manifest.splits.items():
        for shard in shards:
            yield Path(path, split, shard.file), shard.bytes, shard.sha256


def _hash_until(deadline: float, file: Path) -> str | None:
    """Return a file's SHA-256, or `None` if the deadline passes before the file is read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            if time.monotonic() > deadline:
                return None
            digest.update(chunk)
    return digest.hexdigest()


def _call_with_timeout(function: Callable[[], T]) -> T:
    """Call a function in a daemon thread and return its result. Raise `TimeoutError` after `TIMEOUT_SECONDS`."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="dry-run", daemon=True).start()
    return future.result(timeout=TIMEOUT_SECONDS)


@contextmanager
def _explain_timeout(field: str, value: str) -> Iterator[None]:
    """Context manager: replace a `TimeoutError` by an `InputError` that names the recipe field and its value."""
    try:
        yield
    except TimeoutError as error:
        message = f"{field}: {value} did not respond within {TIMEOUT_SECONDS:g} s. Check the address and the network"
        raise InputError(message, code=ErrorCode.UNREACHABLE, field=field) from error
