"""Inspection of a task folder, sample by sample, before training: statistics, problems and warnings.

Training stops at the first error. The inspection examines every sample, counts all errors, and lists the first ones.
Images are decoded in the same way as in training, a few at a time; only their digests stay in memory.
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
    DatasetReport,
    DuplicateImage,
    DuplicatePair,
    Duplicates,
    PixelRange,
    Reason,
    RepeatedName,
    Split,
    SplitFinding,
    Templates,
    UnreadableSample,
    UnreadableSamples,
)
from schemas.errors import InputError
from zscl.checks.findings import class_problems, sample_problems, task_warnings, template_problems, trait_warnings
from zscl.checks.image import ImageFacts, inspect_image, suppress_decoder_warnings
from zscl.checks.prompts import prompt_warnings
from zscl.checks.task_scan import Progress, ScannedShard, ScannedTask, no_progress
from zscl.data.sample import Fault, Sample, decode_label
from zscl.data.task import TaskFolder

MAX_LISTED = 20  # samples and duplicate pairs that are listed; all are counted
BATCH_SIZE = 64  # encoded images in memory
THREADS = min(8, os.cpu_count() or 1)  # each thread holds one decoded image


@dataclass
class _SplitStatistics:
    """Running counts of the usable images of a split."""

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


@dataclass(frozen=True, slots=True)
class _Occurrence:
    """An occurrence of an image: its shard, key and label. An invalid label is `None`."""

    shard: ScannedShard
    key: str
    label: int | None

    def to_report(self) -> DuplicateImage:
        return DuplicateImage(shard=self.shard.finding.shard, key=self.key, label=self.label)


class _DuplicateCounter:
    """Counts duplicate pairs and stores the first ones."""

    def __init__(self) -> None:
        self.count = self.of_other_label = 0
        self.first: list[DuplicatePair] = []

    def add(self, first: _Occurrence, again: _Occurrence) -> None:
        self.count += 1
        self.of_other_label += first.label != again.label
        if len(self.first) < MAX_LISTED:
            self.first.append(DuplicatePair(first=first.to_report(), again=again.to_report()))

    def to_report(self) -> Duplicates:
        return Duplicates(pairs=self.count, of_other_label=self.of_other_label, first=tuple(self.first))


class _TaskStatistics:
    """Statistics of all samples inspected so far.

    Attributes:
        splits: Counts of usable images per split.
        between_splits: Images that occur in both splits.
        within_splits: Images that occur more than once in a split.
    """

    def __init__(self, task: TaskFolder) -> None:
        self.splits = {split: _SplitStatistics([0] * len(task.classnames)) for split in SPLITS}
        self.between_splits, self.within_splits = _DuplicateCounter(), _DuplicateCounter()
        self._task = task
        self._fault_counts: Counter[Reason] = Counter()
        self._unreadable_count = 0
        self._first_unreadable: list[UnreadableSample] = []
        self._first_occurrences: dict[bytes, _Occurrence] = {}  # by image digest

    def add(self, shard: ScannedShard, sample: Sample, image: ImageFacts | Fault) -> None:
        label = self._label(sample)
        faults = [fault for fault in (image, label) if isinstance(fault, Fault)]
        if faults:
            self._add_unreadable(shard, sample.key, faults)
        if isinstance(image, ImageFacts):
            valid_label = label if isinstance(label, int) else None
            if valid_label is not None:
                self.splits[shard.split].add(image, valid_label)
            self._add_occurrence(image.digest, _Occurrence(shard, sample.key, valid_label))

    def unreadable(self) -> UnreadableSamples:
        return UnreadableSamples(
            samples=self._unreadable_count,
            reasons=dict(self._fault_counts.most_common()),
            first=tuple(self._first_unreadable),
        )

    def _label(self, sample: Sample) -> int | Fault | None:
        """Return the sample's label, or a fault if the label is invalid, or `None` if `sample.fault` is set."""
        if sample.fault is not None:
            return None
        if sample.label is None:
            return Fault("no label", "expected a .cls member")
        try:
            return self._task.get_label(sample)
        except InputError:
            text = decode_label(sample.label[:40])
            last = len(self._task.classnames) - 1
            return Fault("label outside the class list", f"found {text!r}, expected 0 to {last}")

    def _add_unreadable(self, shard: ScannedShard, key: str, faults: Sequence[Fault]) -> None:
        self._unreadable_count += 1
        for fault in faults:
            self._fault_counts[fault.reason] += 1
            if len(self._first_unreadable) < MAX_LISTED:
                self._first_unreadable.append(
                    UnreadableSample(shard=shard.finding.shard, key=key, reason=fault.reason, detail=fault.detail)
                )

    def _add_occurrence(self, digest: bytes, occurrence: _Occurrence) -> None:
        first = self._first_occurrences.setdefault(digest, occurrence)
        if first is not occurrence:
            is_same_split = first.shard.split == occurrence.shard.split
            (self.within_splits if is_same_split else self.between_splits).add(first, occurrence)


def inspect_task(scanned: ScannedTask, progress: Progress = no_progress) -> DatasetReport:
    """Inspect every sample of a task.

    Args:
        scanned: The task with its indexed shards.
        progress: Callback that receives the activity, the number of samples done and the total number of samples.

    Returns:
        The statistics, problems and warnings.
    """
    statistics = _TaskStatistics(scanned.task)
    total = sum(shard.finding.samples or 0 for shard in scanned.shards)
    done = 0
    with suppress_decoder_warnings(), ThreadPoolExecutor(THREADS) as threads:  # decoders release the GIL
        for shard in scanned.shards:
            remaining = shard.samples.iter_shard() if shard.samples else iter(())
            while samples := list(islice(remaining, BATCH_SIZE)):
                images = threads.map(_inspect_sample, samples)
                for sample, image in zip(samples, images, strict=True):
                    statistics.add(shard, sample, image)
                done += len(samples)
                progress("checking samples", done, total)
    return _report(scanned, statistics)


def _inspect_sample(sample: Sample) -> ImageFacts | Fault:
    return inspect_image(sample.image) if sample.fault is None else sample.fault


# ------------------------------------------------------------------------------------------------- the report


def _report(scanned: ScannedTask, statistics: _TaskStatistics) -> DatasetReport:
    splits = [_split_finding(split, scanned, statistics.splits[split]) for split in SPLITS]
    classnames = _classnames(scanned.task.classnames, splits)
    templates = _templates(scanned.task.templates)
    unreadable = statistics.unreadable()
    between_splits, within_splits = statistics.between_splits.to_report(), statistics.within_splits.to_report()
    shards = tuple(shard.finding for shard in scanned.shards)
    traits: Counter[str] = sum((split.traits for split in statistics.splits.values()), Counter())
    problems = (
        *scanned.problems,
        *(problem for shard in shards for problem in shard.problems),
        *class_problems(classnames, splits),
        *template_problems(templates),
        *sample_problems(unreadable, between_splits),
    )
    return DatasetReport(
        task=scanned.task.name,
        path=scanned.task.path,
        splits=tuple(splits),
        shards=shards,
        manifest=scanned.manifest is not None,
        unreadable=unreadable,
        between_splits=between_splits,
        within_splits=within_splits,
        classnames=classnames,
        templates=templates,
        problems=problems,
        warnings=(
            *scanned.warnings,
            *task_warnings(classnames, templates, within_splits, splits),
            *trait_warnings(traits),
            *_clip_prompt_warnings(scanned.task),
        ),
    )


def _clip_prompt_warnings(task: TaskFolder) -> list[str]:
    """Return warnings about prompts that exceed the context length, and about classes with equal prompt tokens.

    CLIP's original tokenizer is used, because the dataset is checked without a model.
    """
    messages = prompt_warnings(task, open_clip.get_tokenizer("ViT-B-32"), include_equal_names=False)
    return [f"{message} (with CLIP's own tokenizer)" for message in messages]


def _split_finding(split: Split, scanned: ScannedTask, statistics: _SplitStatistics) -> SplitFinding:
    shards = [shard.finding for shard in scanned.shards if shard.split == split]
    return SplitFinding(
        split=split,
        shards=len(shards),
        samples=sum(shard.samples or 0 for shard in shards),
        images=sum(statistics.per_class),
        per_class=tuple(statistics.per_class),
        empty_classes=tuple(label for label, count in enumerate(statistics.per_class) if not count),
        width=_pixel_range(statistics.widths),
        height=_pixel_range(statistics.heights),
        formats=dict(statistics.formats.most_common()),
        modes=dict(statistics.modes.most_common()),
    )


def _pixel_range(pixels: Counter[int]) -> PixelRange | None:
    """Return the minimum, the lower median and the maximum of a histogram of sizes; `None` if it is empty."""
    if not pixels:
        return None
    median_rank, rank = (pixels.total() - 1) // 2, 0
    for median in sorted(pixels):
        rank += pixels[median]
        if rank > median_rank:
            break
    return PixelRange(min=min(pixels), median=median, max=max(pixels))


def _classnames(names: Sequence[str], splits: Sequence[SplitFinding]) -> ClassNames:
    labels_of: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        labels_of.setdefault(name, []).append(label)
    empty = labels_of.pop("", [])
    images = [sum(counts) for counts in zip(*(split.per_class for split in splits), strict=True)]
    return ClassNames(
        names=tuple(names),
        repeated=tuple(
            RepeatedName(name=name, labels=tuple(labels)) for name, labels in labels_of.items() if len(labels) > 1
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
