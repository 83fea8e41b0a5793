"""A task folder looked at sample by sample before anything is trained on it: folder → finding.

Training stops at the first thing that is wrong; here everything is looked at, counted, and named with its place.
Images are decoded as training decodes them, a few at once, and forgotten; a hash of each is kept.
"""

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import webdataset
from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from schemas.base import InputError
from schemas.inspection import (
    SPLITS,
    ClassNames,
    DuplicatePair,
    Duplicates,
    Extent,
    Inspection,
    Manifest,
    ManifestShard,
    Reason,
    RepeatedName,
    SeenImage,
    ShardFinding,
    Split,
    SplitFinding,
    Templates,
    Unreadable,
    UnreadableSample,
)
from zscl import verdict
from zscl.files import file_digest
from zscl.indexed_samples import IndexedSamples
from zscl.members import IMAGE_SUFFIXES, tar_members
from zscl.samples import Sample
from zscl.streams import FORMATS, decode_image
from zscl.tasks import MANIFEST, TaskFolder, lines_of, text_of

Progress = Callable[[str, int, int], None]  # what, done, total

LISTED = 20  # samples and pairs named one by one; all are counted
AT_ONCE = 64  # encoded images held
THREADS = min(8, os.cpu_count() or 1)  # each holds a decoded image


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing."""


# ------------------------------------------------------------------------------------ the folder and its shards


@dataclass(frozen=True)
class Shard:
    """A promised shard: its samples where it is whole, and the keys of those without an image."""

    split: Split
    samples: IndexedSamples | None
    imageless: tuple[str, ...]
    finding: ShardFinding


@dataclass
class OpenedTask:
    """A task folder whose words are read and whose shards are indexed, whatever is wrong with them."""

    task: TaskFolder
    manifest: Manifest | None = None
    shards: list[Shard] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def open_task(folder: str, progress: Progress = no_progress) -> OpenedTask:
    """Read a task's words, index its shards and compare them with the manifest.

    Raises:
        InputError: this is no local folder with class names in it, so no task at all.
    """
    if "://" in folder:
        raise InputError(f"{folder}: found a remote folder, expected a local one: copy the task here to check it")
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: found no such folder, expected a task")
    classnames = lines_of(f"{folder}/classnames.txt", "class names")
    problems: list[str] = []
    templates: list[str] = []
    try:
        lines = lines_of(f"{folder}/zeroshot_classification_templates.txt", "prompt templates")
        templates = [line for line in lines if line]
    except InputError as error:
        problems.append(str(error))
    task = TaskFolder(Path(folder).resolve().name, folder, tuple(classnames), tuple(templates))
    opened = OpenedTask(task, problems=problems)
    opened.manifest = _read_manifest(task, problems)
    _open_shards(opened, progress)
    return opened


def _read_manifest(task: TaskFolder, problems: list[str]) -> Manifest | None:
    try:
        text = text_of(f"{task.path}/{MANIFEST}")
        return None if text is None else Manifest.model_validate_json(text)
    except (InputError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        problems.append(f"{MANIFEST}: found no manifest ({reason}), expected zscl's own, or no such file")
        return None


def _open_shards(opened: OpenedTask, progress: Progress) -> None:
    promised: list[tuple[Split, Path]] = []
    for split in SPLITS:
        try:
            files = [Path(shard) for shard in opened.task.promised_shards(split)]
        except InputError as error:
            opened.problems.append(str(error))
            continue
        promised += [(split, file) for file in files]
        others = sorted(set(Path(opened.task.path, split).glob("*.tar")) - set(files))
        if others:
            found = verdict.named([file.name for file in others], "shard")
            opened.warnings.append(f"{split}: found {found} that nshards.txt does not count: never read")
    records = _records(opened.manifest)
    for done, (split, file) in enumerate(promised):
        progress("indexing shards", done, len(promised))
        record = records.pop(_place(split, file), None)
        opened.shards.append(_open_shard(split, file, record, opened.manifest is not None))
    opened.problems += [
        f"{MANIFEST}: found {place} in it, expected only shards that nshards.txt promises" for place in records
    ]


def _records(manifest: Manifest | None) -> dict[str, ManifestShard]:
    splits = manifest.splits if manifest else {}
    return {f"{split}/{shard.file}": shard for split, shards in splits.items() for shard in shards}


def _place(split: Split, file: Path) -> str:
    return f"{split}/{file.name}"


def _open_shard(split: Split, file: Path, record: ManifestShard | None, manifest: bool) -> Shard:
    place = _place(split, file)
    if not file.is_file():
        problem = f"{place}: found no such file, expected a shard as nshards.txt promises"
        return Shard(split, None, (), ShardFinding(shard=place, samples=None, bytes=None, problems=(problem,)))
    problems: list[str] = []
    samples: IndexedSamples | None = None
    imageless: tuple[str, ...] = ()
    count: int | None = None
    try:
        samples, imageless = _index(file)
        count = (len(samples) if samples else 0) + len(imageless)
    except (InputError, OSError) as error:
        problems.append(str(error).replace(str(file), place))
    if record is not None:
        problems += _against_manifest(place, file, count, record)
    elif manifest:
        problems.append(f"{place}: found a shard that {MANIFEST} does not know, expected it there")
    size = file.stat().st_size
    return Shard(
        split, samples, imageless, ShardFinding(shard=place, samples=count, bytes=size, problems=tuple(problems))
    )


def _index(file: Path) -> tuple[IndexedSamples | None, tuple[str, ...]]:
    """Index a shard; give its samples, and the keys of those that have no image among their members."""
    suffixes: dict[str, set[str]] = {}
    for name, _, _ in tar_members(file):
        key, suffix = webdataset.tariterators.base_plus_ext(name)
        suffixes.setdefault(key, set()).add(suffix.lower())
    imageless = tuple(key for key, found in suffixes.items() if found.isdisjoint(IMAGE_SUFFIXES))
    return IndexedSamples([file]) if len(imageless) < len(suffixes) else None, imageless


def _against_manifest(place: str, file: Path, samples: int | None, record: ManifestShard) -> list[str]:
    problems, size = [], file.stat().st_size
    if samples is not None and samples != record.samples:
        problems.append(f"{place}: found {samples} samples, expected {record.samples} as {MANIFEST} says")
    if size != record.bytes:
        problems.append(f"{place}: found {size} bytes, expected {record.bytes} as {MANIFEST} says")
    elif (found := file_digest(file)) != record.sha256:
        problems.append(f"{place}: found the SHA-256 {found}, expected {record.sha256} as {MANIFEST} says")
    return problems


# -------------------------------------------------------------------------------------------------- one image


@dataclass(frozen=True, slots=True)
class Decoded:
    """What is kept of a readable image."""

    width: int
    height: int
    format: str
    mode: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Why an image cannot be read."""

    reason: Reason
    detail: str


def look_at(encoded: bytes) -> Decoded | Undecodable:
    """Decode an image to its last pixel, as training does, and keep only figures of it."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height, name, mode = *image.size, image.format or "unknown", image.mode
        decode_image(encoded)
    except Exception as error:  # what a decoder raises on foreign bytes is no closed list, and is the finding itself
        return Undecodable(_reason(error), _detail(error))
    return Decoded(width, height, name, mode, hashlib.blake2b(encoded, digest_size=16).digest())


def _detail(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no image format that PIL knows"  # its own words name an address in memory
    return str(error) or type(error).__name__


def _reason(error: Exception) -> Reason:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "decompression bomb"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated image"
    return "broken image"


@contextmanager
def silent_decoders() -> Iterator[None]:
    """Keep warnings off the terminal: PIL warns of odd metadata and of large images, and decodes them all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------------- all of them


@dataclass
class _Tally:
    """Figures of a split, as they grow."""

    per_class: list[int]
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)

    def add(self, image: Decoded, label: int) -> None:
        self.per_class[label] += 1
        self.widths[image.width] += 1
        self.heights[image.height] += 1
        self.formats[image.format] += 1
        self.modes[image.mode] += 1


class _Pairs:
    """Duplicates: all counted, the first ones kept."""

    def __init__(self) -> None:
        self.count = self.of_other_label = 0
        self.first: list[DuplicatePair] = []

    def add(self, first: "_Sighting", again: "_Sighting") -> None:
        self.count += 1
        self.of_other_label += first.label != again.label
        if len(self.first) < LISTED:
            self.first.append(DuplicatePair(first=first.seen(), again=again.seen()))

    def finding(self) -> Duplicates:
        return Duplicates(pairs=self.count, of_other_label=self.of_other_label, first=tuple(self.first))


@dataclass(frozen=True, slots=True)
class _Sighting:
    shard: Shard
    key: str
    label: int | None

    def seen(self) -> SeenImage:
        return SeenImage(shard=self.shard.finding.shard, key=self.key, label=self.label)


class _Gathered:
    """What is known after the samples looked at so far."""

    def __init__(self, task: TaskFolder) -> None:
        self.task = task
        self.tallies = {split: _Tally([0] * len(task.classnames)) for split in SPLITS}
        self.between, self.within = _Pairs(), _Pairs()
        self.reasons: Counter[Reason] = Counter()
        self._unreadable_samples = 0
        self._first_unreadable: list[UnreadableSample] = []
        self._seen: dict[bytes, _Sighting] = {}

    def without_image(self, shard: Shard, key: str) -> None:
        suffixes = ", ".join(f".{suffix}" for suffix in IMAGE_SUFFIXES)
        self._unreadable(shard, key, [Undecodable("no image member", f"expected one of {suffixes}")])

    def add(self, shard: Shard, sample: Sample, image: Decoded | Undecodable) -> None:
        label = self._label(sample)
        faults = [fault for fault in (image, label) if isinstance(fault, Undecodable)]
        if faults:
            self._unreadable(shard, sample.key, faults)
        if isinstance(image, Decoded):
            known = label if isinstance(label, int) else None
            if known is not None:
                self.tallies[shard.split].add(image, known)
            self._compare(image.content, _Sighting(shard, sample.key, known))

    def unreadable(self) -> Unreadable:
        return Unreadable(
            samples=self._unreadable_samples,
            reasons=dict(self.reasons.most_common()),
            first=tuple(self._first_unreadable),
        )

    def _label(self, sample: Sample) -> int | Undecodable:
        if sample.label is None:
            return Undecodable("no label", "expected a .cls member")
        try:
            return self.task.label_of(sample)
        except InputError:
            text = sample.label[:40].decode("ascii", errors="replace").strip()
            last = len(self.task.classnames) - 1
            return Undecodable("label outside the class list", f"found {text!r}, expected 0 to {last}")

    def _unreadable(self, shard: Shard, key: str, faults: Sequence[Undecodable]) -> None:
        self._unreadable_samples += 1
        for fault in faults:
            self.reasons[fault.reason] += 1
            if len(self._first_unreadable) < LISTED:
                self._first_unreadable.append(
                    UnreadableSample(shard=shard.finding.shard, key=key, reason=fault.reason, detail=fault.detail)
                )

    def _compare(self, content: bytes, sighting: _Sighting) -> None:
        first = self._seen.setdefault(content, sighting)
        if first is not sighting:
            pairs = self.within if first.shard.split == sighting.shard.split else self.between
            pairs.add(first, sighting)


def inspect(opened: OpenedTask, progress: Progress = no_progress) -> Inspection:
    """Look at every sample of a task."""
    gathered = _Gathered(opened.task)
    total = sum(shard.finding.samples or 0 for shard in opened.shards)
    done = 0
    with silent_decoders(), ThreadPoolExecutor(THREADS) as threads:  # decoders let other threads run
        for shard in opened.shards:
            for key in shard.imageless:
                gathered.without_image(shard, key)
            done += len(shard.imageless)
            remaining = shard.samples.once() if shard.samples else iter(())
            while samples := list(islice(remaining, AT_ONCE)):
                images = threads.map(look_at, [sample.image for sample in samples])
                for sample, image in zip(samples, images, strict=True):
                    gathered.add(shard, sample, image)
                done += len(samples)
                progress("looking at samples", done, total)
    return _finding(opened, gathered)


# ------------------------------------------------------------------------------------------------- the finding


def _finding(opened: OpenedTask, gathered: _Gathered) -> Inspection:
    splits = [_split_finding(split, opened, gathered.tallies[split]) for split in SPLITS]
    classnames = _classnames(opened.task.classnames, splits)
    templates = _templates(opened.task.templates)
    unreadable, between, within = gathered.unreadable(), gathered.between.finding(), gathered.within.finding()
    shards = tuple(shard.finding for shard in opened.shards)
    problems = (
        *opened.problems,
        *(problem for shard in shards for problem in shard.problems),
        *verdict.class_problems(classnames, splits),
        *verdict.template_problems(templates),
        *verdict.sample_problems(unreadable, between),
    )
    return Inspection(
        task=opened.task.name,
        path=opened.task.path,
        splits=tuple(splits),
        shards=shards,
        manifest=opened.manifest is not None,
        unreadable=unreadable,
        between_splits=between,
        within_splits=within,
        classnames=classnames,
        templates=templates,
        problems=problems,
        warnings=(*opened.warnings, *verdict.warnings_of(classnames, templates, within, splits)),
    )


def _split_finding(split: Split, opened: OpenedTask, tally: _Tally) -> SplitFinding:
    shards = [shard.finding for shard in opened.shards if shard.split == split]
    return SplitFinding(
        split=split,
        shards=len(shards),
        samples=sum(shard.samples or 0 for shard in shards),
        images=sum(tally.per_class),
        per_class=tuple(tally.per_class),
        empty_classes=tuple(label for label, count in enumerate(tally.per_class) if not count),
        width=_extent(tally.widths),
        height=_extent(tally.heights),
        formats=dict(tally.formats.most_common()),
        modes=dict(tally.modes.most_common()),
    )


def _extent(pixels: Counter[int]) -> Extent | None:
    if not pixels:
        return None
    middle, below = (pixels.total() - 1) // 2, 0
    for median in sorted(pixels):
        below += pixels[median]
        if below > middle:
            break
    return Extent(min=min(pixels), median=median, max=max(pixels))


def _classnames(names: Sequence[str], splits: Sequence[SplitFinding]) -> ClassNames:
    labels: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        labels.setdefault(name, []).append(label)
    empty = labels.pop("", [])
    images = [sum(counts) for counts in zip(*(split.per_class for split in splits), strict=True)]
    return ClassNames(
        names=tuple(names),
        repeated=tuple(
            RepeatedName(name=name, labels=tuple(found)) for name, found in labels.items() if len(found) > 1
        ),
        empty=tuple(empty),
        unused=tuple(label for label, count in enumerate(images) if not count),
    )


def _templates(templates: Sequence[str]) -> Templates:
    return Templates(
        templates=tuple(templates),
        repeated=tuple(template for template, count in Counter(templates).items() if count > 1),
        without_place=tuple(template for template in templates if "{c}" not in template),
    )
