"""What a dry run checks: all that would make a run fail in its first minute, one line each."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooSlowError
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import ValidationError

from orchestrate.cluster.storage_sync import remote_folder_url
from orchestrate.lifecycle.lock import owner_message
from orchestrate.lifecycle.paths import check_writable, sqlite_file, store_uri
from orchestrate.runs import preflight
from schemas.compute import Compute
from schemas.dataset_report import Manifest
from schemas.errors import InputError
from schemas.experiment import Experiment
from schemas.redaction import mask
from zscl.data.task import MANIFEST, TaskFolder, read_text
from zscl.sequence.object_store import RemoteSync
from zscl.sequence.resolve import ResolvedExperiment

DIGEST_SECONDS = 5.0  # for the shards' SHA-256, of all tasks together
ANSWER_SECONDS = 20.0  # for a server or a bucket to answer
T = TypeVar("T")
Connect = Callable[[], Mapping[str, float]]  # to the cluster that a recipe names, which it checks; gives its resources


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        status: whether a run may start, as far as this check knows.
        detail: what was found, or why it was skipped; of a failure, the whole sentence.
    """

    name: str
    status: Literal["ok", "failed", "skipped"]
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.status} ({self.detail})" if self.detail else f"{self.name}: {self.status}"


class SkippedError(Exception):
    """A check has nothing to look at, and says why."""


@dataclass
class Checklist:
    """Checks, in the order in which they were made."""

    checks: list[Check] = field(default_factory=list)

    def check(self, name: str, look: Callable[[], str]) -> None:
        """Make a check.

        Args:
            name: what is checked.
            look: looks, and says what it found.
        """
        try:
            self.checks.append(Check(name, "ok", mask(look())))
        except SkippedError as reason:
            self.checks.append(Check(name, "skipped", mask(str(reason))))
        except InputError as error:
            self.checks.append(Check(name, "failed", mask(str(error))))

    @property
    def lines(self) -> list[str]:
        """One line for each check."""
        return list(map(str, self.checks))

    def refuse_failures(self, note: Callable[[str], None]) -> None:
        """Refuse what failed; the whole list is noted first.

        Raises:
            InputError: with the sentence of every check that failed.
        """
        failed = [check.detail for check in self.checks if check.status == "failed"]
        if failed:
            for check in self.checks:  # what failed is said behind it
                note(f"{check.name}: failed" if check.status == "failed" else str(check))
            raise InputError("\n".join(dict.fromkeys(failed)))


def check_run(opened: ResolvedExperiment, folder: Path, offline: bool, connect: Connect) -> Checklist:
    """Check what a run needs beside its recipe, data and model, which `preflight.prepare` has looked at.

    Args:
        opened: the experiment.
        folder: of the run.
        offline: whether it is run without MLflow.
        connect: to the cluster, if the recipe or the environment names one.
    """
    checklist = Checklist()
    if (folder / "result.json").is_file():
        checklist.check("run", lambda: "finished before, nothing is left to do")
        return checklist
    stages, model = len(opened.tasks), preflight.model_megabytes(opened)
    checklist.check("recipe, data and model", lambda: f"{stages} stages, a model of {model:.0f} MB")
    _check_common(checklist, opened, folder, offline, connect)
    checklist.check("disk", lambda: _disk(folder, preflight.megabytes_needed(opened, folder)))
    return checklist


def _check_common(
    checklist: Checklist,
    opened: ResolvedExperiment,
    folder: Path,
    offline: bool,
    connect: Connect,
) -> None:
    experiment = opened.experiment
    checklist.check("shards against their manifest", lambda: _digests(opened.tasks))
    checklist.check("folder", lambda: _folder(experiment, folder))
    checklist.check("storage", lambda: _storage(experiment, folder))
    checklist.check("cluster", lambda: _cluster(experiment.compute, connect))
    checklist.check("tracking", lambda: _tracking(experiment, folder, offline))


def _folder(experiment: Experiment, folder: Path) -> str:
    """See that a run can write its folder and what lies beside it, and that no other process is at work on it."""
    preflight.check_places(experiment, folder)
    lock = folder.with_name(f".{folder.name}.lock")
    if lock.exists():
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout as error:
            raise InputError(owner_message(folder)) from error
        except OSError as error:
            raise InputError(f"{lock}: cannot be locked ({error.strerror}), expected a file of this user") from error
    return f"{folder} can be written"


def _disk(folder: Path, needed: float) -> str:
    preflight.check_free_disk(folder, needed)
    return f"{needed:.0f} MB needed, {preflight.megabytes_free(folder):.0f} MB free"


def _storage(experiment: Experiment, folder: Path) -> str:
    """See that object storage can be written and read."""
    url = remote_folder_url(experiment, folder)
    if url is None:
        raise SkippedError("no compute.storage")
    with _known_by(f"compute.storage: {mask(url)}"):
        _answered(lambda: RemoteSync(url, folder).check())
    return f"{mask(url)} can be written"


def _cluster(compute: Compute, connect: Connect) -> str:
    """See that the cluster holds the workers; where there is none yet, that this machine does."""
    from orchestrate.cluster.connect import check_resources, names_cluster, resources_here

    if names_cluster(compute):
        return ", ".join(f"{kind} {amount:g}" for kind, amount in connect().items())
    here = resources_here()
    check_resources(compute, here)
    return "this machine: " + ", ".join(f"{amount:g} {kind}s" for kind, amount in here.items())


def _tracking(experiment: Experiment, folder: Path, offline: bool) -> str:
    """See that the tracking store answers, and that its experiment takes runs. Nothing is made there."""
    if offline:
        raise SkippedError("--offline")
    uri = store_uri(experiment, folder)
    file = sqlite_file(uri)
    if file is not None:
        for made in (file.parent, file.parent / "mlflow-artifacts"):  # the files of runs lie beside the database
            check_writable(made, "set tracking.uri to another store, or run with --offline")
        if not file.exists():
            return f"{mask(uri)} will be made"
        if file.is_dir() or not os.access(file, os.W_OK):
            raise InputError(
                f"tracking.uri: found {file} to be no file that can be written, expected an SQLite file of this user; "
                "set tracking.uri to another store, or run with --offline"
            )
    from orchestrate.tracking.mlflow_client import check_store

    with _known_by(f"tracking.uri: {mask(uri)}"):
        return f"{mask(uri)}: {_answered(lambda: check_store(uri, experiment.tracking.experiment))}"


def _digests(tasks: Sequence[TaskFolder]) -> str:
    """Compare local shards with their manifests: all sizes, and as many SHA-256 as a few seconds allow."""
    until, read, listed, without = time.monotonic() + DIGEST_SECONDS, 0, 0, 0
    for path in dict.fromkeys(task.path for task in tasks):
        if "://" in path:
            raise SkippedError(f"{path} is remote")
        shards = list(_manifest(path))
        without += not shards
        for file, size, sha256 in shards:
            listed += 1
            if not file.is_file():
                raise InputError(f"{file}: found no such file, expected a shard as {MANIFEST} beside it says")
            if file.stat().st_size != size:
                raise InputError(
                    f"{file}: found {file.stat().st_size} bytes, expected {size} as {path}/{MANIFEST} says"
                )
            found = _sha256(file, until)
            if found is None:
                continue
            read += 1
            if found != sha256:
                raise InputError(
                    f"{file}: found the SHA-256 {found}, expected {sha256} as {path}/{MANIFEST} says; copy the shard "
                    "again, or delete the manifest if you changed the shard"
                )
    if not listed:
        raise SkippedError(f"no task has a {MANIFEST}")
    rest = "" if read == listed else f", in {DIGEST_SECONDS:g} s; `zscl data check` reads them all"
    none = f"; {without} tasks have no {MANIFEST}" if without else ""
    return f"the sizes of {listed} shards, the SHA-256 of {read}{rest}{none}"


def _manifest(path: str) -> Iterator[tuple[Path, int, str]]:
    """Give each shard that a task's manifest lists, with its size and SHA-256."""
    text = read_text(f"{path}/{MANIFEST}")
    if text is None:
        return
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InputError(
            f"{path}/{MANIFEST}: found no manifest ({reason}), expected zscl's own, or no such file"
        ) from error
    for split, shards in manifest.splits.items():
        for shard in shards:
            yield Path(path, split, shard.file), shard.bytes, shard.sha256


def _sha256(file: Path, until: float) -> str | None:
    """Hash a file; `None` where there is no time for all of it."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            if time.monotonic() > until:
                return None
            total.update(chunk)
    return total.hexdigest()


def _answered(ask: Callable[[], T]) -> T:
    """Wait for an answer for a limited time.

    Raises:
        TooSlowError: there is none; the thread that waits for it ends with the process.
    """
    answer: Future[T] = Future()

    def settle() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=settle, name="dry-run", daemon=True).start()
    return answer.result(timeout=ANSWER_SECONDS)


@contextmanager
def _known_by(what: str) -> Iterator[None]:
    """Say in a sentence what did not answer.

    Raises:
        InputError: there was no answer in time.
    """
    try:
        yield
    except TooSlowError as error:
        raise InputError(f"{what} did not answer within {ANSWER_SECONDS:g} s, expected one that does") from error
