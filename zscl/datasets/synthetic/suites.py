"""Writer of the embedded suite: its tasks, its reference set and its pre-training corpus."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from zscl.data.tar import write_shards
from zscl.data.task import MANIFEST
from zscl.datasets.synthetic import domains, embedded
from zscl.datasets.task_writer import write_task
from zscl.runtime.atomic_io import atomic_folder

REFERENCE_PAIRS = 2_000
CORPUS_PAIRS, CORPUS_TASK_STYLE_SHARE = 30_000, 0.15
# The seeds differ, so that no picture occurs in two sets.
TASK_SEED, CORPUS_SEED, REFERENCE_SEED = 0, 1, 2


def write_embedded(folder: Path, corpus: bool, report: Callable[[str], None]) -> list[Path]:
    """Write the embedded suite. A task, reference set or corpus that exists is not written again.

    Args:
        folder: Folder in which the tasks, the reference set and the corpus are written.
        corpus: Whether to also write the corpus on which the embedded model was pre-trained.
        report: Called with a message for the user before each task or set is drawn.

    Returns:
        The folders of the tasks, of the reference set and of the corpus, in this order.
    """
    folders = []
    for name, domain in domains.DOMAINS.items():
        task_folder = folder / name
        if not (task_folder / MANIFEST).is_file():
            report(f"drawing {task_folder}")
            write_task(
                task_folder,
                domain.classnames,
                domain.templates,
                splits={
                    "train": embedded.task_samples(name, "train", None, TASK_SEED),
                    "test": embedded.task_samples(name, "test", None, TASK_SEED),
                },
                suffix="png",
                source="zscl embedded suite",
            )
        folders.append(task_folder)
    sets = {"reference": (REFERENCE_PAIRS, REFERENCE_SEED, 0.0)}
    if corpus:
        sets["corpus"] = (CORPUS_PAIRS, CORPUS_SEED, CORPUS_TASK_STYLE_SHARE)
    for name, (count, seed, task_style_share) in sets.items():
        set_folder = folder / name
        if not set_folder.is_dir():
            report(f"drawing {set_folder}: {count} captioned images")
            with atomic_folder(set_folder) as temporary:
                write_shards(temporary, _shard_samples(count, seed, task_style_share), shard_images=5_000)
        folders.append(set_folder)
    return folders


def _shard_samples(count: int, seed: int, task_style_share: float) -> Iterator[Mapping[str, bytes]]:
    for image, caption in embedded.captioned_samples(count, seed, task_style_share):
        yield {"png": image, "txt": caption.encode()}
