"""A run's folder in object storage, as the process that started the run sees it: its own folder is a copy."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from schemas.experiment import Experiment
from zscl.sequence.object_store import RemoteSync, pull_periodically, storage_url
from zscl.training.checkpoint import CHECKPOINT

NOT_WATCHED = (CHECKPOINT,)  # large, and of no use but to the workers
Following = Callable[[], AbstractContextManager[None]]


def remote_folder_url(experiment: Experiment, folder: Path) -> str | None:
    """Where the run's folder is in object storage, if it is kept there."""
    storage = experiment.compute.storage
    return None if storage is None else storage_url(storage, folder)


@contextmanager
def synced_folder(experiment: Experiment, folder: Path) -> Iterator[Following]:
    """Begin with what storage has of a run's folder, and leave there what is said in it here.

    Gives what follows, in a block, what the workers leave; when the block ends, everything is here.

    Raises:
        InputError: storage cannot be written.
    """
    url = remote_folder_url(experiment, folder)
    if url is None:
        yield _nothing
        return
    mirror = RemoteSync(url, folder)
    mirror.check()
    mirror.pull(without=NOT_WATCHED)

    @contextmanager
    def following() -> Iterator[None]:
        mirror.push()
        ended = threading.Event()
        thread = threading.Thread(
            target=pull_periodically, args=(mirror, NOT_WATCHED, ended.wait), name="follow", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            mirror.pull(without=NOT_WATCHED)

    try:
        yield following
    finally:
        mirror.push()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
