"""Suites: which tasks, from which sources. The embedded one is rendered here and needs no download."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from zscl.data.tar import write_shards
from zscl.data.task import MANIFEST
from zscl.datasets.synthetic import domains, embedded
from zscl.datasets.task_writer import write_task
from zscl.runtime.atomic_io import atomic_folder

REFERENCE_PAIRS = 2_000
CORPUS_PAIRS, CORPUS_TASK_STYLE_SHARE = 30_000, 0.15
# No two of these draw the same picture.
TASK_SEED, CORPUS_SEED, REFERENCE_SEED = 0, 1, 2


def write_embedded(folder: Path, corpus: bool, report: Callable[[str], None]) -> list[Path]:
    """Write the embedded suite's tasks and reference set, and the corpus its model was pre-trained on if asked.

    What is there already is kept. Returns the folders, tasks first.
    """
    places = []
    for name, domain in domains.DOMAINS.items():
        place = folder / name
        if not (place / MANIFEST).is_file():
            report(f"drawing {place}")
            write_task(
                place,
                domain.classnames,
                domain.templates,
                splits={
                    "train": embedded.task_samples(name, "train", None, TASK_SEED),
                    "test": embedded.task_samples(name, "test", None, TASK_SEED),
                },
                suffix="png",
                source="zscl embedded suite",
            )
        places.append(place)
    sets = {"reference": (REFERENCE_PAIRS, REFERENCE_SEED, 0.0)}
    if corpus:
        sets["corpus"] = (CORPUS_PAIRS, CORPUS_SEED, CORPUS_TASK_STYLE_SHARE)
    for name, (count, seed, task_look) in sets.items():
        place = folder / name
        if not place.is_dir():
            report(f"drawing {place}: {count} captioned images")
            with atomic_folder(place) as temporary:
                write_shards(temporary, _captioned(count, seed, task_look), shard_images=5_000)
        places.append(place)
    return places


def _captioned(count: int, seed: int, task_look_share: float) -> Iterator[Mapping[str, bytes]]:
    for image, caption in embedded.captioned_samples(count, seed, task_look_share):
        yield {"png": image, "txt": caption.encode()}
