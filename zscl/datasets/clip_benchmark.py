"""Ready-made copies of the tasks in the WebDataset layout, from the Hugging Face Hub; not all have the same splits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from schemas.errors import InputError
from zscl.data.indexed import IndexedSamples
from zscl.data.shard_urls import open_samples
from zscl.data.task import MANIFEST, TaskFolder, read_lines
from zscl.datasets.mtil import classnames_of, templates_of
from zscl.datasets.sources import PreparedTask, find_existing_task
from zscl.datasets.task_writer import FileList
from zscl.runtime.atomic_io import atomic_folder, write_text
from zscl.runtime.hashing import sha256_of_file

SPLIT_FAMILY = "clip-benchmark-wds"

# Repository, and how its split differs from that of the published numbers.
MTIL_COPIES = {
    "Aircraft": ("wds_fgvc_aircraft", "the published split"),
    "Caltech101": ("wds_vtab-caltech101", "another split, and a class more: the background"),
    "CIFAR100": ("wds_vtab-cifar100", "5 000 training images are held out"),
    "DTD": ("wds_vtab-dtd", "probably the published split"),
    "EuroSAT": ("wds_vtab-eurosat", "another split"),
    "Flowers": ("wds_vtab-flowers", "probably the published split"),
    "Food": ("wds_food101", "the published split"),
    "MNIST": ("wds_mnist", "the published split"),
    "OxfordPet": ("wds_vtab-pets", "80 % of the training images"),
    "StanfordCars": ("wds_cars", "the published split"),
    "SUN397": ("wds_sun397", "a test split alone: the task can be evaluated and not trained"),
}

# Test sets that tell how far a model has drifted; class names and templates are the copies' own.
DRIFT_COPIES = {
    "ImageNet": ("wds_imagenet1k", "the validation images"),
    "ImageNetV2": ("wds_imagenetv2", "matched frequency"),
    "ImageNet-A": ("wds_imagenet-a", "200 classes"),
    "ImageNet-R": ("wds_imagenet-r", "200 classes"),
    "ImageNet-Sketch": ("wds_imagenet_sketch", "all classes"),
    "ObjectNet": ("wds_objectnet", "113 classes"),
}


def fetch(task: str, out: Path) -> PreparedTask:
    """Download a copy to the task folder `out/task`; one that is there is kept.

    A task of MTIL gets our class names and templates. Of ImageNet and its shifts, the test split alone is fetched.

    An interrupted download is taken up again by the next call.

    Raises:
        InputError: it cannot be downloaded, its shards are not whole, or something else lies where the task would.
    """
    folder = out / task
    repository, difference = (MTIL_COPIES | DRIFT_COPIES)[task]
    kept = find_existing_task(folder, SPLIT_FAMILY)
    if kept is not None:
        return replace(kept, notes=(difference,))
    downloaded = out / ".downloads" / repository
    _download(task, repository, downloaded)
    ours = task in MTIL_COPIES
    splits = [split for split in ("train", "test")[not ours :] if (downloaded / split / "nshards.txt").is_file()]
    if "test" not in splits:
        raise InputError(f"{task}: found no test/nshards.txt in clip-benchmark/{repository}, expected a task's layout")
    classnames, notes = read_lines(f"{downloaded}/classnames.txt", "class names"), list[str]()
    templates = [] if ours else read_lines(f"{downloaded}/zeroshot_classification_templates.txt", "prompt templates")
    if ours:
        classnames, notes = _our_classnames(task, classnames)
        templates = templates_of(task)
    images, manifest = _manifest(task, downloaded, splits, classnames, repository)
    with atomic_folder(folder) as temporary:
        for split in splits:
            # Moved last of all, when everything about them is known to be right.
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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{task}: cannot download clip-benchmark/{repository} ({reason}), expected a copy") from error


def _our_classnames(task: str, theirs: list[str]) -> tuple[list[str], list[str]]:
    """Their label order in our spelling, and what to say of it."""
    ours = classnames_of(task, theirs)
    changed = [f"'{there}' is '{here}' here" for there, here in zip(theirs, ours, strict=True) if there != here]
    return ours, [f"{len(changed)} class names are CLIP's: {', '.join(changed[:3])}"] if changed else []


def _manifest(
    task: str, downloaded: Path, splits: list[str], classnames: list[str], repository: str
) -> tuple[dict[str, int], str]:
    """Images a split, and the manifest; every shard and label has been looked at then."""
    opened = TaskFolder(task, str(downloaded), tuple(classnames), ())
    images: dict[str, int] = {}
    shards: dict[str, list[dict[str, object]]] = {}
    file_lists: dict[str, str] = {}
    for split in splits:
        files, shards[split], images[split] = FileList(), [], 0
        for shard in opened.shards(split):
            samples = open_samples([shard])
            assert isinstance(samples, IndexedSamples)
            for sample in samples.labels():
                files.add(f"{split}/{Path(shard).name}/{sample.key}", opened.label_of(sample))
            size = Path(shard).stat().st_size
            shards[split].append(
                {
                    "file": Path(shard).name,
                    "samples": len(samples),
                    "bytes": size,
                    "sha256": sha256_of_file(Path(shard)),
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
