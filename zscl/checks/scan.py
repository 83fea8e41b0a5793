"""A task folder looked at sample by sample before anything is trained on it: folder → finding.

Training stops at the first thing that is wrong; here everything is looked at, counted, and named with its place.
Images are decoded as training decodes them, a few at once, and forgotten; a hash of each is kept.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import open_clip

from schemas.dataset_report import (
    SPLITS,
    ClassNames,
    DuplicatePair,
    Duplicates,
    Extent,
    Inspection,
    Reason,
    RepeatedName,
    SeenImage,
    Split,
    SplitFinding,
    Templates,
    Unreadable,
    UnreadableSample,
)
from schemas.errors import InputError
from zscl.checks.findings import class_problems, sample_problems, template_problems, trait_warnings, task_warnings
from zscl.checks.image import DecodeError, ImageFacts, inspect_image, suppress_decoder_warnings
from zscl.checks.prompts import prompt_warnings
from zscl.checks.task_scan import Progress, ScannedTask, ScannedShard, no_progress
from zscl.data.sample import Sample, decode_label
from zscl.data.task import TaskFolder

MAX_LISTED = 20  # samples and pairs named one by one; all are counted
AT_ONCE = 64  # encoded images held
THREADS = min(8, os.cpu_count() or 1)  # each holds a decoded image


@dataclass
class _Tally:
    """Figures of a split, as they grow."""

    per_class: list[int]
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    traits: Counter[str] = field(default_factory=Counter)

    def add(self, image: ImageFacts, label: int) -> None:
        self.per_class[label] += 1
        self.widths[image.width] += 1
        self.heights[image.height] += 1
        self.formats[image.format] += 1
        self.modes[image.mode] += 1
        self.traits.update(image.traits)


class _Pairs:
    """Duplicates: all counted, the first ones kept."""

    def __init__(self) -> None:
        self.count = self.of_other_label = 0
        self.first: list[DuplicatePair] = []

    def add(self, first: "_Sighting", again: "_Sighting") -> None:
        self.count += 1
        self.of_other_label += first.label != again.label
        if len(self.first) < MAX_LISTED:
            self.first.append(DuplicatePair(first=first.seen(), again=again.seen()))

    def finding(self) -> Duplicates:
        return Duplicates(pairs=self.count, of_other_label=self.of_other_label, first=tuple(self.first))


@dataclass(frozen=True, slots=True)
class _Sighting:
    shard: ScannedShard
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

    def add(self, shard: ScannedShard, sample: Sample, image: ImageFacts | DecodeError) -> None:
        label = self._label(sample)
        faults = [fault for fault in (image, label) if isinstance(fault, DecodeError)]
        if faults:
            self._unreadable(shard, sample.key, faults)
        if isinstance(image, ImageFacts):
            known = label if isinstance(label, int) else None
            if known is not None:
                self.tallies[shard.split].add(image, known)
            self._compare(image.digest, _Sighting(shard, sample.key, known))

    def unreadable(self) -> Unreadable:
        return Unreadable(
            samples=self._unreadable_samples,
            reasons=dict(self.reasons.most_common()),
            first=tuple(self._first_unreadable),
        )

    def _label(self, sample: Sample) -> int | DecodeError | None:
        if sample.fault is not None:  # that is enough: `image` says it
            return None
        if sample.label is None:
            return DecodeError("no label", "expected a .cls member")
        try:
            return self.task.label_of(sample)
        except InputError:
            text = decode_label(sample.label[:40])
            last = len(self.task.classnames) - 1
            return DecodeError("label outside the class list", f"found {text!r}, expected 0 to {last}")

    def _unreadable(self, shard: ScannedShard, key: str, faults: Sequence[DecodeError]) -> None:
        self._unreadable_samples += 1
        for fault in faults:
            self.reasons[fault.reason] += 1
            if len(self._first_unreadable) < MAX_LISTED:
                self._first_unreadable.append(
                    UnreadableSample(shard=shard.finding.shard, key=key, reason=fault.reason, detail=fault.detail)
                )

    def _compare(self, content: bytes, sighting: _Sighting) -> None:
        first = self._seen.setdefault(content, sighting)
        if first is not sighting:
            pairs = self.within if first.shard.split == sighting.shard.split else self.between
            pairs.add(first, sighting)


def inspect_task(scanned: ScannedTask, progress: Progress = no_progress) -> Inspection:
    """Look at every sample of a task."""
    gathered = _Gathered(scanned.task)
    total = sum(shard.finding.samples or 0 for shard in scanned.shards)
    done = 0
    with suppress_decoder_warnings(), ThreadPoolExecutor(THREADS) as threads:  # decoders let other threads run
        for shard in scanned.shards:
            remaining = shard.samples.iter_shard() if shard.samples else iter(())
            while samples := list(islice(remaining, AT_ONCE)):
                images = threads.map(_look_at, samples)
                for sample, image in zip(samples, images, strict=True):
                    gathered.add(shard, sample, image)
                done += len(samples)
                progress("looking at samples", done, total)
    return _finding(scanned, gathered)


def _look_at(sample: Sample) -> ImageFacts | DecodeError:
    fault = sample.fault
    return inspect_image(sample.image) if fault is None else DecodeError(fault.reason, fault.detail)


# ------------------------------------------------------------------------------------------------- the finding


def _finding(opened: ScannedTask, gathered: _Gathered) -> Inspection:
    splits = [_split_finding(split, opened, gathered.tallies[split]) for split in SPLITS]
    classnames = _classnames(opened.task.classnames, splits)
    templates = _templates(opened.task.templates)
    unreadable, between, within = gathered.unreadable(), gathered.between.finding(), gathered.within.finding()
    shards = tuple(shard.finding for shard in opened.shards)
    traits: Counter[str] = sum((tally.traits for tally in gathered.tallies.values()), Counter())
    problems = (
        *opened.problems,
        *(problem for shard in shards for problem in shard.problems),
        *class_problems(classnames, splits),
        *template_problems(templates),
        *sample_problems(unreadable, between),
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
        warnings=(
            *opened.warnings,
            *task_warnings(classnames, templates, within, splits),
            *trait_warnings(traits),
            *_prompts_of_clip(opened.task),
        ),
    )


def _prompts_of_clip(task: TaskFolder) -> list[str]:
    """What CLIP's own tokenizer makes of the prompts; which model will read them is not known here."""
    sentences = prompt_warnings(task, open_clip.get_tokenizer("ViT-B-32"), include_equal_names=False)
    return [f"{sentence} (as CLIP's own tokenizer reads them)" for sentence in sentences]


def _split_finding(split: Split, opened: ScannedTask, tally: _Tally) -> SplitFinding:
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
