"""A task folder opened whatever is wrong with it: what it promises, what is there, and what does not fit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from schemas.dataset_report import SPLITS, Manifest, ManifestShard, ShardFinding, Split
from schemas.errors import InputError
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import printable_name
from zscl.data.task import MANIFEST, TaskFolder, dotted_keys_warning, read_lines, read_text, uncounted_shards_warning
from zscl.runtime.hashing import sha256_of_file

Progress = Callable[[str, int, int], None]  # what, done, total


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class ScannedShard:
    """A promised shard, and its samples where it is whole."""

    split: Split
    samples: IndexedSamples | None
    finding: ShardFinding


@dataclass
class ScannedTask:
    """A task folder whose words are read and whose shards are indexed, whatever is wrong with them."""

    task: TaskFolder
    manifest: Manifest | None = None
    shards: list[ScannedShard] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def scan_task(folder: str, progress: Progress = no_progress) -> ScannedTask:
    """Read a task's words, index its shards and compare them with the manifest.

    Raises:
        InputError: this is no local folder with class names in it, so no task at all.
    """
    if "://" in folder:
        raise InputError(f"{folder}: found a remote folder, expected a local one: copy the task here to check it")
    if not folder.isprintable():
        raise InputError(f"{printable_name(folder)}: found a path that is no text, expected printable characters")
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: found no such folder, expected a task")
    classnames = read_lines(f"{folder}/classnames.txt", "class names")
    problems: list[str] = []
    templates: list[str] = []
    try:
        lines = read_lines(f"{folder}/zeroshot_classification_templates.txt", "prompt templates")
        templates = [line for line in lines if line]
    except InputError as error:
        problems.append(str(error))
    task = TaskFolder(Path(folder).resolve().name, folder, tuple(classnames), tuple(templates))
    opened = ScannedTask(task, problems=problems)
    opened.manifest = _read_manifest(task, problems)
    _open_shards(opened, progress)
    return opened


def _read_manifest(task: TaskFolder, problems: list[str]) -> Manifest | None:
    try:
        text = read_text(f"{task.path}/{MANIFEST}")
        return None if text is None else Manifest.model_validate_json(text)
    except (InputError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        problems.append(f"{MANIFEST}: found no manifest ({reason}), expected zscl's own, or no such file")
        return None


def _open_shards(opened: ScannedTask, progress: Progress) -> None:
    promised: list[tuple[Split, Path]] = []
    for split in SPLITS:
        try:
            files = [Path(shard) for shard in opened.task.promised_shards(split)]
        except InputError as error:
            opened.problems.append(str(error))
            continue
        promised += [(split, file) for file in files]
        if others := opened.task.uncounted_shards(split):
            opened.warnings.append(uncounted_shards_warning(split, others))
    records = _records(opened.manifest)
    for done, (split, file) in enumerate(promised):
        progress("indexing shards", done, len(promised))
        record = records.pop(_place(split, file), None)
        opened.shards.append(_open_shard(split, file, record, opened.manifest is not None))
    for split in SPLITS:
        found = [shard.samples.dotted_keys() for shard in opened.shards if shard.split == split and shard.samples]
        if keys := [key for each in found for key in each]:
            opened.warnings.append(dotted_keys_warning(split, keys))
    opened.problems += [
        f"{MANIFEST}: found {place} in it, expected only shards that nshards.txt promises" for place in records
    ]


def _records(manifest: Manifest | None) -> dict[str, ManifestShard]:
    splits = manifest.splits if manifest else {}
    return {f"{split}/{shard.file}": shard for split, shards in splits.items() for shard in shards}


def _place(split: Split, file: Path) -> str:
    return f"{split}/{file.name}"


def _open_shard(split: Split, file: Path, record: ManifestShard | None, manifest: bool) -> ScannedShard:
    place = _place(split, file)
    if not file.is_file():
        problem = f"{place}: found no such file, expected a shard as nshards.txt promises"
        return ScannedShard(split, None, ShardFinding(shard=place, samples=None, bytes=None, problems=(problem,)))
    problems: list[str] = []
    samples: IndexedSamples | None = None
    count: int | None = None
    try:
        samples = IndexedSamples([file])
        count = len(samples)
    except (InputError, OSError) as error:
        problems.append(str(error).replace(str(file), place))
    if record is not None:
        problems += _against_manifest(place, file, count, record)
    elif manifest:
        problems.append(f"{place}: found a shard that {MANIFEST} does not know, expected it there")
    size = file.stat().st_size
    return ScannedShard(split, samples, ShardFinding(shard=place, samples=count, bytes=size, problems=tuple(problems)))


def _against_manifest(place: str, file: Path, samples: int | None, record: ManifestShard) -> list[str]:
    problems, size = [], file.stat().st_size
    if samples is not None and samples != record.samples:
        problems.append(f"{place}: found {samples} samples, expected {record.samples} as {MANIFEST} says")
    if size != record.bytes:
        problems.append(f"{place}: found {size} bytes, expected {record.bytes} as {MANIFEST} says")
    elif (found := sha256_of_file(file)) != record.sha256:
        problems.append(f"{place}: found the SHA-256 {found}, expected {record.sha256} as {MANIFEST} says")
    return problems
