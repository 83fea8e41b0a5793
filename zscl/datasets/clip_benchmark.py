"""Download of ready-made tasks in the WebDataset layout from the Hugging Face Hub (`clip-benchmark/wds_*`).

The splits of some of these tasks differ from those of the published results.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from schemas.errors import ErrorCode, InputError, one_line
from zscl.data.indexed import IndexedSamples
from zscl.data.shard_urls import open_samples
from zscl.data.task import MANIFEST, TaskFolder, read_lines
from zscl.datasets.mtil import classnames_of, templates_of
from zscl.datasets.sources import PreparedTask, find_existing_task
from zscl.datasets.task_writer import FileList
from zscl.runtime.atomic_io import atomic_folder, write_text
from zscl.runtime.hashing import sha256_of_file

SPLIT_FAMILY = "clip-benchmark-wds"

# Task -> its repository, and how the repository's split compares with the split of the published results.
MTIL_COPIES = {
    "Aircraft": ("wds_fgvc_aircraft", "the published split"),
    "Caltech101": ("wds_vtab-caltech101", "another split, and an additional class: the background"),
    "CIFAR100": ("wds_vtab-cifar100", "5 000 training images are held out"),
    "DTD": ("wds_vtab-dtd", "probably the published split"),
    "EuroSAT": ("wds_vtab-eurosat", "another split"),
    "Flowers": ("wds_vtab-flowers", "probably the published split"),
    "Food": ("wds_food101", "the published split"),
    "MNIST": ("wds_mnist", "the published split"),
    "OxfordPet": ("wds_vtab-pets", "80 % of the training images"),
    "StanfordCars": ("wds_cars", "the published split"),
    "SUN397": ("wds_sun397", "only a test split: the task can be evaluated, but not trained"),
}

# Test sets that measure the drift of a model. Their class names and templates are those of the repositories.
DRIFT_COPIES = {
    "ImageNet": ("wds_imagenet1k", "the validation images"),
    "ImageNetV2": ("wds_imagenetv2", "matched frequency"),
    "ImageNet-A": ("wds_imagenet-a", "200 classes"),
    "ImageNet-R": ("wds_imagenet-r", "200 classes"),
    "ImageNet-Sketch": ("wds_imagenet_sketch", "all classes"),
    "ObjectNet": ("wds_objectnet", "113 classes"),
}


def fetch(task: str, out: Path) -> PreparedTask:
    """Download a task to the folder `out/task`. An existing task is reused.

    MTIL tasks get the class names and templates of the published results. For ImageNet and its variants, only the test
    split is downloaded. If the download is interrupted, the next call resumes it.

    Args:
        task: A name in `MTIL_COPIES` or `DRIFT_COPIES`.
        out: Folder of the tasks.

    Returns:
        The downloaded or existing task.

    Raises:
        InputError: The task cannot be downloaded, its shards are damaged, or `out/task` exists with other content.
    """
    folder = out / task
    repository, difference = (MTIL_COPIES | DRIFT_COPIES)[task]
    existing = find_existing_task(folder, SPLIT_FAMILY)
    if existing is not None:
        return replace(existing, notes=(difference,))
    downloaded = out / ".downloads" / repository
    _download(task, repository, downloaded)
    is_mtil = task in MTIL_COPIES
    splits = [split for split in ("train", "test")[not is_mtil :] if (downloaded / split / "nshards.txt").is_file()]
    if "test" not in splits:
        raise InputError(
            f"{task}: found no test/nshards.txt in clip-benchmark/{repository}, expected the layout of a task",
            code=ErrorCode.NOT_FOUND,
        )
    classnames, notes = read_lines(f"{downloaded}/classnames.txt", "class names"), list[str]()
    if is_mtil:
        classnames, notes = _published_classnames(task, classnames)
        templates = templates_of(task)
    else:
        templates = read_lines(f"{downloaded}/zeroshot_classification_templates.txt", "prompt templates")
    images, manifest = _manifest(task, downloaded, splits, classnames, repository)
    with atomic_folder(folder) as temporary:
        for split in splits:
            # The shards are moved only after everything has been checked.
            (downloaded / split).rename(temporary / split)
        write_text(temporary / "classnames.txt", "\n".join(classnames) + "\n")
        write_text(temporary / "zeroshot_classification_templates.txt", "\n".join(templates) + "\n")
        write_text(temporary / MANIFEST, manifest)
    shutil.rmtree(downloaded, ignore_errors=True)
    return PreparedTask(task, str(folder), images, SPLIT_FAMILY, notes=(difference, *notes))


def _download(task: str, repository: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    splits = ("*",) if task in MTIL_COPIES else ("test",)
    patterns = ["*.txt", *(f"{split}/{files}" for split in splits for files in ("nshards.txt", "*.tar"))]
    try:
        snapshot_download(
            f"clip-benchmark/{repository}", repo_type="dataset", local_dir=str(folder), allow_patterns=patterns
        )
    except Exception as error:
        raise InputError(
            f"{task}: cannot download clip-benchmark/{repository} ({one_line(error)}); the next call "
            "resumes the download",
            code=ErrorCode.UNREACHABLE,
        ) from error


def _published_classnames(task: str, copied: list[str]) -> tuple[list[str], list[str]]:
    """Return the published class names in the label order of `copied`, and a note about the names that differ."""
    published = classnames_of(task, copied)
    changed = [f"'{old}' by '{new}'" for old, new in zip(copied, published, strict=True) if old != new]
    note = f"{len(changed)} class names are replaced by CLIP's class names: {', '.join(changed[:3])}"
    return published, [note] if changed else []


def _manifest(
    task: str, downloaded: Path, splits: list[str], classnames: list[str], repository: str
) -> tuple[dict[str, int], str]:
    """Check every shard and label of a download, and return the number of images per split and the manifest."""
    task_folder = TaskFolder(task, str(downloaded), tuple(classnames), ())
    images: dict[str, int] = {}
    shards: dict[str, list[dict[str, object]]] = {}
    file_lists: dict[str, str] = {}
    for split in splits:
        files, shards[split], images[split] = FileList(), [], 0
        for shard in map(Path, task_folder.list_shards(split)):
            samples = open_samples([str(shard)])
            assert isinstance(samples, IndexedSamples)
            for sample in samples.iter_labels():
                files.add(f"{split}/{shard.name}/{sample.key}", task_folder.get_label(sample))
            shards[split].append(
                {
                    "file": shard.name,
                    "samples": len(samples),
                    "bytes": shard.stat().st_size,
                    "sha256": sha256_of_file(shard),
                }
            )
            images[split] += len(samples)
        file_lists[split] = files.sha256
    content = {
        "source": f"clip-benchmark/{repository}",
        "split_family": SPLIT_FAMILY,
        "file_lists": file_lists,
        "splits": shards,
    }
    return images, json.dumps(content, indent=1) + "\n"
