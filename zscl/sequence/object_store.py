"""A run's folder in object storage, where nodes share no file system.

Every node works in a folder of its own. What one worker leaves there is pushed, what others need is pulled: files that
have changed, each whole, and those last whose presence says that others are there (see `zscl.sequence.run`).
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

from schemas.errors import InputError, one_line
from schemas.redaction import mask
from zscl.runtime.atomic_io import ASIDE, atomic_file, remove_quietly, write_text
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io

KNOWN = ".mirror.json"
EVERY_SECONDS = 10.0
T = TypeVar("T")
# Names that say "what lies beside me is whole", in the order in which they may be believed.
LAST = ("training.json", "zero_shot.json", "accuracy.json", "result.json")
VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created", "updated")


def storage_url(storage: str, folder: Path) -> str:
    """Where a run's folder lies in storage: under its own name."""
    return f"{storage.rstrip('/')}/{folder.name}"


def node_local_folder(url: str) -> "RemoteSync":
    """A worker's mirror, in a temporary folder that the workers of a machine share."""
    return RemoteSync(url, Path(tempfile.gettempdir()) / f"zscl-{os.getuid()}" / sha256_of(url)[:16] / "run")


class RemoteSync:
    """A folder here and the same in storage.

    Both sides are compared with what they were when they last agreed, which a hidden file in the folder remembers; a
    process that is killed leaves it as it is.
    """

    def __init__(self, url: str, folder: Path) -> None:
        """Open a store.

        Args:
            url: of the folder in storage, as fsspec takes it.
            folder: here; it need not exist.

        Raises:
            InputError: there is no such kind of storage, or its client is not installed.
        """
        self.url, self.folder = url, folder
        try:
            self._storage, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"compute.storage: found {mask(url)}, which cannot be opened ({error})") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._pushing: Future[None] | None = None
        self._pushed = time.monotonic()

    def check(self) -> None:
        """See that storage can be written and read.

        Raises:
            InputError: it cannot.
        """
        place = f"{self._root}/.writable"
        try:
            self._make_folder(place)
            self._storage.pipe_file(place, b"written")
            found = self._storage.cat_file(place)
            self._storage.rm_file(place)
        except Exception as error:  # fsspec raises what its stores raise: no credentials, no such bucket, ...
            reason = mask(one_line(error))
            raise InputError(
                f"compute.storage: {mask(self.url)} cannot be written ({type(error).__name__}: {reason}), expected "
                "storage and credentials that can"
            ) from error
        if found != b"written":
            raise InputError(f"compute.storage: {mask(self.url)} does not give back what was written to it")

    def versions(self) -> dict[str, str]:
        """List what is in storage: each file's version by its path in the folder; nothing where there is no folder.

        Hidden folders and that of Ray are not listed.

        Raises:
            Exception: what the client of the storage raises. fsspec's own `exists`, `find` and `walk` take a folder
                that they cannot list, at whatever depth, for an empty one, and what is not listed would be removed
                here.
        """
        found: dict[str, str] = {}
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                listed = self._storage.ls(folder, detail=True)
            except FileNotFoundError:  # there is none, or it was removed meanwhile
                continue
            for info in listed:
                path = info["name"].rstrip("/")
                name = path.removeprefix(self._root).lstrip("/")
                if path == folder or _hidden(f"{name}/"):  # some clients list a folder within itself
                    continue
                if info["type"] == "directory":
                    folders.append(path)
                else:
                    found[name] = _version(info)
        return found

    def pull(self, exactly: bool = False, without: Iterable[str] = ()) -> None:
        """Fetch what has changed in storage, and forget what is no longer there.

        Args:
            exactly: nothing else remains here, be it newer; else what was changed here stays.
            without: names of files that are not fetched.

        Raises:
            OSError: storage has failed for minutes.
        """
        with self._alone():
            known, there = self._manifest(), self._patiently(self.versions)
            skipped, here = frozenset(without), dict(self._local())
            for name in sorted(there, key=_order):
                if Path(name).name in skipped or _hidden(name):
                    continue
                agreed = known.get(name, {})
                ours = here.get(name)
                changed_here = ours is not None and ours != agreed.get("here")
                if there[name] == agreed.get("there") and ours is not None and not (exactly and changed_here):
                    continue
                if changed_here and not exactly:
                    continue
                file = self.folder / name
                if self._patiently(partial(self._fetch, name, file)):
                    known[name] = {"here": _stamp(file), "there": there[name]}
            for name in [name for name in here if name not in there and (exactly or name in known)]:
                if exactly or here[name] == known[name]["here"]:
                    remove_quietly(self.folder / name)
                    known.pop(name, None)
            self._remember(known)

    def push(self) -> None:
        """Have in storage what has changed here, behind what is being pushed.

        Raises:
            OSError: storage has failed for minutes.
        """
        self._thread.submit(self._push).result()

    def push_async(self, soon: bool = False) -> None:
        """Push now and then, or soon, beside what goes on; what fails is tried again, or fails in the next `push`."""
        idle = self._pushing is None or self._pushing.done()
        if idle and (soon or time.monotonic() - self._pushed > EVERY_SECONDS):
            self._pushed = time.monotonic()
            self._pushing = self._thread.submit(self._push)

    def _push(self) -> None:
        with self._alone():
            known, here = self._manifest(), dict(self._local())
            for name in sorted(here, key=_order):
                if here[name] == known.get(name, {}).get("here"):
                    continue
                there = self._patiently(partial(self._send, name))
                if there is not None:
                    known[name] = {"here": here[name], "there": there}
                    self._remember(known)  # it may take minutes until the next
            for name in [name for name in known if name not in here]:
                self._patiently(partial(self._remove, name))
                del known[name]
            self._remember(known)

    def _send(self, name: str) -> str | None:
        """Send a file. Returns its version in storage; nothing where it has gone meanwhile."""
        place = f"{self._root}/{name}"
        try:
            self._make_folder(place)
            self._storage.put_file(str(self.folder / name), place)
        except FileNotFoundError:
            if (self.folder / name).exists():
                raise
            return None
        return _version(self._storage.info(place))

    def _make_folder(self, place: str) -> None:
        """Only where storage has folders: elsewhere a name that is mistaken would become a bucket."""
        if isinstance(self._storage, LocalFileSystem):
            self._storage.makedirs(self._storage._parent(place), exist_ok=True)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._storage.rm_file(f"{self._root}/{name}")

    def _fetch(self, name: str, file: Path) -> bool:
        """Fetch a file. Returns whether it was there: others may have removed it meanwhile."""
        place = f"{self._root}/{name}"
        try:
            with atomic_file(file) as temporary:
                self._storage.get_file(place, str(temporary))
        except FileNotFoundError:
            if self._storage.exists(place):
                raise
            return False
        return True

    def _patiently(self, access: Callable[[], T]) -> T:
        """Access storage, again while it fails with a transient error.

        Raises:
            OSError: it still fails; of whatever the client of the storage has raised.
        """
        try:
            return retry_io(access, what=mask(self.url))
        except OSError:
            raise
        except Exception as error:
            reason = mask(" ".join(str(error).split()))
            raise OSError(f"{mask(self.url)}: {type(error).__name__}: {reason}") from error

    def _alone(self) -> FileLock:
        """Workers of one node share its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".mirror.lock")

    def _local(self) -> Iterable[tuple[str, str]]:
        for file in self.folder.rglob("*"):
            name = file.relative_to(self.folder).as_posix()
            if not _hidden(name) and file.is_file():
                yield name, _stamp(file)

    def _manifest(self) -> dict[str, dict[str, str]]:
        try:
            known: dict[str, dict[str, str]] = json.loads((self.folder / KNOWN).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return known

    def _remember(self, known: Mapping[str, Any]) -> None:
        write_text(self.folder / KNOWN, json.dumps(known))


def _hidden(name: str) -> bool:
    """Half-written files, locks and names of owners; and what is damaged or Ray keeps, which nobody reads."""
    return any(fnmatch(f"/{name}", pattern) for pattern in ("*/.*", f"*/{ASIDE}*", "/ray/*"))


def _order(name: str) -> tuple[int, str]:
    last = Path(name).name
    return (1 + LAST.index(last) if last in LAST else 0), name


def _stamp(file: Path) -> str:
    try:
        found = file.stat()
    except FileNotFoundError:
        return "gone"
    return f"{found.st_size} {found.st_mtime_ns}"


def _version(info: Mapping[str, Any]) -> str:
    return " ".join(str(info[key]) for key in ("size", *VERSIONS) if info.get(key) is not None)


def pull_periodically(mirror: RemoteSync, without: Iterable[str], until: Callable[[float], bool]) -> None:
    """Pull again and again, while storage lets us, until `until(seconds)` says so."""
    while not until(EVERY_SECONDS):
        try:
            mirror.pull(without=without)
        except OSError:  # it is only to be watched: the end pulls again
            continue
