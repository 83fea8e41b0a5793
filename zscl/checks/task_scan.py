"""Scan of a task folder that may be damaged: class names, templates, manifest and shards, with all problems listed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from schemas.dataset_report import SPLITS, Manifest, ManifestShard, ShardFinding, Split
from schemas.errors import ErrorCode, InputError
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import printable_name
from zscl.data.task import MANIFEST, TaskFolder, describe_dotted_keys, describe_extra_shards, read_lines, read_text
from zscl.runtime.hashing import sha256_of_file

Progress = Callable[[str, int, int], None]  # activity, done, total


def no_progress(activity: str, done: int, total: int) -> None:
    """Ignore the progress: the default callback."""


@dataclass(frozen=True)
class ScannedShard:
    """A shard that `nshards.txt` lists; it may be missing.

    Attributes:
        split: The split that the shard belongs to.
        samples: The indexed samples, or `None` if the shard is missing or damaged.
        finding: Statistics and problems of the shard.
    """

    split: Split
    samples: IndexedSamples | None
    finding: ShardFinding


@dataclass
class ScannedTask:
    """The readable content of a task folder, and the problems found by the scan.

    Attributes:
        task: The task with its class names and templates.
        manifest: The manifest; `None` if there is no manifest or it is invalid.
        shards: The shards listed in `nshards.txt`, train before test.
        problems: Messages about errors in the folder. Errors in a shard are in the shard's `finding`.
        warnings: Messages about content that may be intended.
    """

    task: TaskFolder
    manifest: Manifest | None = None
    shards: list[ScannedShard] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def scan_task(folder: str, progress: Progress = no_progress) -> ScannedTask:
    """Read a task's class names and templates, index its shards and compare them with the manifest.

    Args:
        folder: Path of the task folder.
        progress: Callback that receives the activity, the number of shards done and the total number of shards.

    Returns:
        The readable content of the folder, and messages about all problems.

    Raises:
        InputError: The folder is not a local task folder with class names.
    """
    if "://" in folder:
        raise InputError(
            f"{folder}: found a remote folder, expected a local one; copy the task to this machine to check it",
            code=ErrorCode.UNSUPPORTED,
        )
    if not folder.isprintable():
        raise InputError(
            f"{printable_name(folder)}: found a path with unprintable characters, expected printable ones",
            code=ErrorCode.INVALID_VALUE,
        )
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: found no such folder, expected a task folder", code=ErrorCode.NOT_FOUND)
    classnames = read_lines(f"{folder}/classnames.txt", "class names")
    problems: list[str] = []
    templates: list[str] = []
    try:
        lines = read_lines(f"{folder}/zeroshot_classification_templates.txt", "prompt templates")
        templates = [line for line in lines if line]
    except InputError as error:
        problems.append(str(error))
    task = TaskFolder(Path(folder).resolve().name, folder, tuple(classnames), tuple(templates))
    scanned = ScannedTask(task, problems=problems)
    scanned.manifest = _read_manifest(task, problems)
    _scan_shards(scanned, progress)
    return scanned


def _read_manifest(task: TaskFolder, problems: list[str]) -> Manifest | None:
    try:
        text = read_text(f"{task.path}/{MANIFEST}")
        return None if text is None else Manifest.model_validate_json(text)
    except (InputError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        problems.append(
            f"{MANIFEST}: found an invalid manifest ({reason}), expected one written by zscl, or no such file"
        )
        return None


def _scan_shards(scanned: ScannedTask, progress: Progress) -> None:
    expected: list[tuple[Split, Path]] = []
    for split in SPLITS:
        try:
            files = [Path(shard) for shard in scanned.task.list_expected_shards(split)]
        except InputError as error:
            scanned.problems.append(str(error))
            continue
        expected += [(split, file) for file in files]
        if uncounted := scanned.task.find_extra_shards(split):
            scanned.warnings.append(describe_extra_shards(split, uncounted))
    records = _shard_records(scanned.manifest)
    for done, (split, file) in enumerate(expected):
        progress("indexing shards", done, len(expected))
        record = records.pop(_shard_name(split, file), None)
        scanned.shards.append(_scan_shard(split, file, record, scanned.manifest is not None))
    for split in SPLITS:
        shards = [shard.samples for shard in scanned.shards if shard.split == split and shard.samples]
        if keys := [key for samples in shards for key in samples.find_dotted_keys()]:
            scanned.warnings.append(describe_dotted_keys(split, keys))
    scanned.problems += [f"{MANIFEST}: found {shard}, expected only shards listed in nshards.txt" for shard in records]


def _shard_records(manifest: Manifest | None) -> dict[str, ManifestShard]:
    splits = manifest.splits if manifest else {}
    return {f"{split}/{shard.file}": shard for split, shards in splits.items() for shard in shards}


def _shard_name(split: Split, file: Path) -> str:
    return f"{split}/{file.name}"


def _scan_shard(split: Split, file: Path, record: ManifestShard | None, has_manifest: bool) -> ScannedShard:
    name = _shard_name(split, file)
    if not file.is_file():
        problem = f"{name}: found no such file, expected a shard listed in nshards.txt"
        return ScannedShard(split, None, ShardFinding(shard=name, samples=None, bytes=None, problems=(problem,)))
    problems: list[str] = []
    samples: IndexedSamples | None = None
    count: int | None = None
    try:
        samples = IndexedSamples([file])
        count = len(samples)
    except (InputError, OSError) as error:
        problems.append(str(error).replace(str(file), name))
    if record is not None:
        problems += _manifest_problems(name, file, count, record)
    elif has_manifest:
        problems.append(f"{name}: found a shard that is not in {MANIFEST}")
    size = file.stat().st_size
    return ScannedShard(split, samples, ShardFinding(shard=name, samples=count, bytes=size, problems=tuple(problems)))


def _manifest_problems(name: str, file: Path, samples: int | None, record: ManifestShard) -> list[str]:
    """Return messages about differences between a shard and its entry in the manifest."""
    problems, size = [], file.stat().st_size
    if samples is not None and samples != record.samples:
        problems.append(f"{name}: found {samples} samples, expected {record.samples} according to {MANIFEST}")
    if size != record.bytes:
        problems.append(f"{name}: found {size} bytes, expected {record.bytes} according to {MANIFEST}")
    elif (sha256 := sha256_of_file(file)) != record.sha256:
        problems.append(f"{name}: found the SHA-256 {sha256}, expected {record.sha256} according to {MANIFEST}")
    return problems
