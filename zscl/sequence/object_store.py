"""Synchronisation of a run's folder with object storage, for clusters whose nodes share no file system.

Every node works in a local folder. Files that a rank writes are uploaded (pushed). Files that other ranks have written
are downloaded (pulled). A file whose existence means that other files are complete (see `zscl.sequence.layout`) is
transferred after them.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import ErrorCode, InputError, one_line
from schemas.redaction import mask
from zscl.runtime.atomic_io import QUARANTINE_PREFIX, atomic_file, remove_if_possible, write_text
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io
from zscl.sequence.layout import ACCURACY, RAY_FOLDER, RESULT, SYNC_LOCK, SYNC_MANIFEST, TRAINING, ZERO_SHOT

SYNC_SECONDS = 10.0
T = TypeVar("T")
# Files that mark other files as complete, in the order of their transfer.
PUSHED_LAST = (TRAINING, ZERO_SHOT, ACCURACY, RESULT)
# The keys under which fsspec's file systems report the version of a file.
VERSION_KEYS = (
    "ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created", "updated"
)  # fmt: skip


def storage_url(storage: str, folder: Path) -> str:
    """Return the URL of a run's folder in object storage: `storage`, followed by the name of the folder."""
    return f"{storage.rstrip('/')}/{folder.name}"


def node_local_sync(url: str) -> "RemoteSync":
    """Build an object that synchronises a run's folder in object storage with a temporary folder on this machine.

    All ranks on this machine share the temporary folder.

    Args:
        url: The URL of the run's folder in object storage.

    Returns:
        The synchronisation object.
    """
    return RemoteSync(url, Path(tempfile.gettempdir()) / f"zscl-{os.getuid()}" / sha256_of(url)[:16] / "run")


class RemoteSync:
    """Synchronises a local folder with a folder in object storage.

    A hidden file in the local folder, the manifest, holds the local and the remote version of each file at its last
    transfer. If a version differs from the manifest, the file has changed since then. The manifest stays valid if the
    process is killed.

    Attributes:
        url: The URL of the folder in object storage.
        folder: The local folder.
    """

    def __init__(self, url: str, folder: Path) -> None:
        """Open the object storage.

        Args:
            url: The fsspec URL of the folder in object storage.
            folder: The local folder; it need not exist.

        Raises:
            InputError: fsspec does not know the protocol, or its client is not installed.
        """
        self.url, self.folder = url, folder
        try:
            self._storage, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            code = ErrorCode.MISSING_PACKAGE if isinstance(error, ImportError) else ErrorCode.INVALID_VALUE
            raise InputError(
                f"compute.storage: found {mask(url)}, which cannot be opened ({error})",
                code=code,
                field="compute.storage",
            ) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._pending_push: Future[None] | None = None
        self._last_push = time.monotonic()

    def check(self) -> None:
        """Check that files can be written, read and deleted in object storage.

        Raises:
            InputError: A file cannot be written, read or deleted.
        """
        path = f"{self._root}/.writable"
        try:
            self._make_parent(path)
            self._storage.pipe_file(path, b"written")
            content = self._storage.cat_file(path)
            self._storage.rm_file(path)
        except Exception as error:  # the clients raise exceptions of many classes: no credentials, no such bucket, …
            reason = mask(one_line(error))
            raise InputError(
                f"compute.storage: {mask(self.url)} cannot be written ({type(error).__name__}: {reason}), expected "
                "storage and credentials that allow writing",
                code=ErrorCode.NOT_WRITABLE,
                field="compute.storage",
            ) from error
        if content != b"written":
            raise InputError(
                f"compute.storage: {mask(self.url)} returns other content than was written to it",
                code=ErrorCode.MISMATCH,
                field="compute.storage",
            )

    def list_remote(self) -> dict[str, str]:
        """List the files in object storage.

        Hidden files and folders, and Ray's folder, are not listed. If a folder cannot be listed, fsspec's `exists`,
        `find` and `walk` treat it as empty, and its local files would be deleted. This method raises an error instead.

        Returns:
            The version of each file by its path relative to the folder; empty if the folder does not exist.
        """
        versions: dict[str, str] = {}
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                entries = self._storage.ls(folder, detail=True)
            except FileNotFoundError:  # the folder does not exist, or was removed in the meantime
                continue
            for entry in entries:
                path = entry["name"].rstrip("/")
                name = path.removeprefix(self._root).lstrip("/")
                if path == folder or _is_excluded(f"{name}/"):  # some clients list a folder within itself
                    continue
                if entry["type"] == "directory":
                    folders.append(path)
                else:
                    versions[name] = _remote_version(entry)
        return versions

    def pull(self, exact: bool = False, exclude: Iterable[str] = ()) -> None:
        """Download files that have changed in object storage, and delete local files that were removed from there.

        Args:
            exact: Whether to overwrite or delete all local files that differ, even if they have changed locally. By
                default, files that have changed locally stay.
            exclude: Names of files that are not downloaded.

        Raises:
            OSError: Storage has failed for several minutes.
        """
        with self._lock():
            manifest, remote = self._manifest(), self._retry(self.list_remote)
            excluded, local = frozenset(exclude), dict(self._local())
            for name in sorted(remote, key=_transfer_order):
                if Path(name).name in excluded or _is_excluded(name):
                    continue
                known = manifest.get(name, {})
                local_version = local.get(name)
                is_changed_here = local_version is not None and local_version != known.get("here")
                is_unchanged_there = remote[name] == known.get("there") and local_version is not None
                if is_unchanged_there and not (exact and is_changed_here):
                    continue
                if is_changed_here and not exact:
                    continue
                file = self.folder / name
                if self._retry(partial(self._download, name, file)):
                    manifest[name] = {"here": _local_version(file), "there": remote[name]}
            for name in [name for name in local if name not in remote and (exact or name in manifest)]:
                if exact or local[name] == manifest[name]["here"]:
                    remove_if_possible(self.folder / name)
                    manifest.pop(name, None)
            self._write_manifest(manifest)

    def push(self) -> None:
        """Upload the files that have changed locally, delete those that were removed locally, and wait for the end.

        Raises:
            OSError: Storage has failed for several minutes.
        """
        self._thread.submit(self._push).result()

    def push_async(self, immediately: bool = False) -> None:
        """Start a push in the background if none is running and the last one is more than `SYNC_SECONDS` old.

        Errors are ignored, because the next push uploads the same files again.

        Args:
            immediately: Whether to start a push even if the last one is more recent.
        """
        is_idle = self._pending_push is None or self._pending_push.done()
        if is_idle and (immediately or time.monotonic() - self._last_push > SYNC_SECONDS):
            self._last_push = time.monotonic()
            self._pending_push = self._thread.submit(self._push)

    def _push(self) -> None:
        with self._lock():
            manifest, local = self._manifest(), dict(self._local())
            for name in sorted(local, key=_transfer_order):
                if local[name] == manifest.get(name, {}).get("here"):
                    continue
                version = self._retry(partial(self._upload, name))
                if version is not None:
                    manifest[name] = {"here": local[name], "there": version}
                    self._write_manifest(manifest)  # the next file may take minutes
            for name in [name for name in manifest if name not in local]:
                self._retry(partial(self._delete_remote, name))
                del manifest[name]
            self._write_manifest(manifest)

    def _upload(self, name: str) -> str | None:
        """Upload a file and return its version in storage; `None` if the local file was removed in the meantime."""
        path = f"{self._root}/{name}"
        try:
            self._make_parent(path)
            self._storage.put_file(str(self.folder / name), path)
        except FileNotFoundError:
            if (self.folder / name).exists():
                raise
            return None
        return _remote_version(self._storage.info(path))

    def _make_parent(self, path: str) -> None:
        """Create the parent folder of a path in a local file system. In other storage, this could create a bucket."""
        if isinstance(self._storage, LocalFileSystem):
            self._storage.makedirs(self._storage._parent(path), exist_ok=True)

    def _delete_remote(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._storage.rm_file(f"{self._root}/{name}")

    def _download(self, name: str, file: Path) -> bool:
        """Download a file. Return `False` if another process has removed the file from object storage."""
        path = f"{self._root}/{name}"
        try:
            with atomic_file(file) as temporary:
                self._storage.get_file(path, str(temporary))
        except FileNotFoundError:
            if self._storage.exists(path):
                raise
            return False
        return True

    def _retry(self, operation: Callable[[], T]) -> T:
        """Run an operation on storage with retries. Errors of all storage clients are raised as `OSError`."""
        try:
            return retry_io(operation, description=mask(self.url))
        except OSError:
            raise
        except Exception as error:
            reason = mask(" ".join(str(error).split()))
            raise OSError(f"{mask(self.url)}: {type(error).__name__}: {reason}") from error

    def _lock(self) -> FileLock:
        """Return the lock of the local folder, which all ranks of a node share."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / SYNC_LOCK)

    def _local(self) -> Iterable[tuple[str, str]]:
        """Yield the path and the version of each local file."""
        for file in self.folder.rglob("*"):
            name = file.relative_to(self.folder).as_posix()
            if not _is_excluded(name) and file.is_file():
                yield name, _local_version(file)

    def _manifest(self) -> dict[str, dict[str, str]]:
        """Read the local and remote versions of each file at its last transfer; empty if there is no manifest."""
        try:
            manifest: dict[str, dict[str, str]] = json.loads((self.folder / SYNC_MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return manifest

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text(self.folder / SYNC_MANIFEST, json.dumps(manifest))


def _is_excluded(name: str) -> bool:
    """Return whether a file is never transferred: temporary, hidden and damaged files, locks, and Ray's folder."""
    patterns = ("*/.*", f"*/{QUARANTINE_PREFIX}*", f"/{RAY_FOLDER}/*")
    return any(fnmatch(f"/{name}", pattern) for pattern in patterns)


def _transfer_order(name: str) -> tuple[int, str]:
    file_name = Path(name).name
    return (1 + PUSHED_LAST.index(file_name) if file_name in PUSHED_LAST else 0), name


def _local_version(file: Path) -> str:
    try:
        status = file.stat()
    except FileNotFoundError:
        return "gone"
    return f"{status.st_size} {status.st_mtime_ns}"


def _remote_version(entry: Mapping[str, Any]) -> str:
    return " ".join(str(entry[key]) for key in ("size", *VERSION_KEYS) if entry.get(key) is not None)


def pull_periodically(sync: RemoteSync, exclude: Iterable[str], wait_for_stop: Callable[[float], bool]) -> None:
    """Download changed files every `SYNC_SECONDS` until a stop is requested. Errors of storage are ignored.

    Args:
        sync: Synchronises the local folder with object storage.
        exclude: Names of files that are not downloaded.
        wait_for_stop: Called with a number of seconds. It waits that long at most, and returns `True` if a stop is
            requested, as `threading.Event.wait` does.
    """
    while not wait_for_stop(SYNC_SECONDS):
        try:
            sync.pull(exclude=exclude)
        except OSError:  # this copy only serves to display progress; the caller pulls again at the end
            continue
