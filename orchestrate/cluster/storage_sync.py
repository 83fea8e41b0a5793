"""Sync of a run's folder with object storage, on the driver. The driver's copy does not contain the checkpoint."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from schemas.experiment import Experiment
from zscl.sequence.layout import CHECKPOINT
from zscl.sequence.object_store import RemoteSync, pull_periodically, storage_url

NOT_PULLED = (CHECKPOINT,)  # it is large, and only the workers need it
BackgroundPull = Callable[[], AbstractContextManager[None]]


def remote_folder_url(experiment: Experiment, folder: Path) -> str | None:
    """Return the URL of a run's folder in object storage; `None` without `compute.storage`."""
    storage = experiment.compute.storage
    return None if storage is None else storage_url(storage, folder)


@contextmanager
def synced_folder(experiment: Experiment, folder: Path) -> Iterator[BackgroundPull]:
    """Context manager: pull a run's folder from object storage on entry, and push it on exit.

    Without `compute.storage`, do nothing.

    Args:
        experiment: The run's experiment.
        folder: The run's folder on this machine.

    Yields:
        A function that returns a context manager. While its block runs, a thread periodically pulls the files that the
        workers push. On exit, the remaining files are pulled.

    Raises:
        InputError: The storage cannot be written.
    """
    url = remote_folder_url(experiment, folder)
    if url is None:
        yield nullcontext
        return
    sync = RemoteSync(url, folder)
    sync.check()
    sync.pull(exclude=NOT_PULLED)

    @contextmanager
    def background_pull() -> Iterator[None]:
        sync.push()
        ended = threading.Event()
        thread = threading.Thread(
            target=pull_periodically, args=(sync, NOT_PULLED, ended.wait), name="background-pull", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            sync.pull(exclude=NOT_PULLED)

    try:
        yield background_pull
    finally:
        sync.push()
