"""Sync of a run's folder with object storage, on the driver. The driver's copy does not contain the checkpoint."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from schemas.experiment import Experiment
from zscl.sequence.layout import CHECKPOINT
from zscl.sequence.object_store import RemoteSync, pull_periodically, storage_url

NOT_PULLED = (CHECKPOINT,)  # the checkpoint is large, and only the workers need it
BackgroundPull = Callable[[], AbstractContextManager[None]]


def remote_folder_url(experiment: Experiment, folder: Path) -> str | None:
    """Return the URL of a run's folder in object storage; `None` without `compute.storage`."""
    storage = experiment.compute.storage
    return None if storage is None else storage_url(storage, folder)


@contextmanager
def synced_folder(experiment: Experiment, folder: Path) -> Iterator[BackgroundPull]:
    """Context manager: download a run's folder from object storage on entry, and upload it on exit.

    If the recipe does not set `compute.storage`, do nothing.

    Args:
        experiment: The run's experiment.
        folder: The run's folder on this machine.

    Yields:
        A function that returns a second context manager, for the time in which the workers run. Inside that context, a
        thread periodically downloads the files that the workers upload. On exit, the remaining files are downloaded.

    Raises:
        InputError: The object storage cannot be written to.
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
