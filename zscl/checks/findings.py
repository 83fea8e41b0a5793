"""What is wrong with a task's data, and what is only worth knowing: findings → sentences."""

from collections.abc import Iterator, Mapping, Sequence

from schemas.dataset_report import ClassNames, Duplicates, SplitFinding, Templates, Unreadable
from schemas.errors import counted, listed


def class_problems(classnames: ClassNames, splits: Sequence[SplitFinding]) -> Iterator[str]:
    """Classes that have no name, or no image in a split that should have some."""
    for label in classnames.empty:
        yield f"classnames.txt: found line {label + 1} empty, expected a class name: the line number is the label"
    for split in splits:
        # A label that neither split uses is a warning; an empty split has its own sentence.
        missing = [label for label in split.empty_classes if label not in classnames.unused]
        if split.shards and not split.images:
            yield f"{split.split}: found no sample that can be used, expected some"
        elif split.images and missing:
            classes = listed([classnames.names[label] for label in missing], "class", "classes")
            yield f"{split.split}: found no image of {classes}, expected at least one of each"


def template_problems(templates: Templates) -> Iterator[str]:
    """Templates that training refuses."""
    for template in templates.without_place:
        yield f"templates: found {template!r}, expected a {{c}} for the class name in it"


def sample_problems(unreadable: Unreadable, between_splits: Duplicates) -> Iterator[str]:
    """Samples that training cannot use, and those that make a test too easy."""
    if unreadable.samples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in unreadable.reasons.items())
        yield f"found {counted(unreadable.samples, 'sample')} that cannot be used ({reasons}), expected none"
    if between_splits.pairs:
        images = counted(between_splits.pairs, "test image")
        yield f"found {images} among the training images too{_other_labels(between_splits)}, expected none"


def task_warnings(
    classnames: ClassNames, templates: Templates, within_splits: Duplicates, splits: Sequence[SplitFinding]
) -> Iterator[str]:
    """What may be meant: CLIP's own names of ImageNet have two that stand for two classes each."""
    for repeated in classnames.repeated:
        labels = " and ".join(map(str, repeated.labels))
        yield f"classnames.txt: found {repeated.name!r} for the labels {labels}: no prompt tells them apart"
    if classnames.unused and any(split.images for split in splits):
        classes = listed([classnames.names[label] for label in classnames.unused], "class", "classes")
        yield f"classnames.txt: found {classes} of which neither split has an image"
    for template in templates.repeated:
        yield f"templates: found {template!r} more than once"
    if within_splits.pairs:
        yield f"found {counted(within_splits.pairs, 'image')} a second time within a split{_other_labels(within_splits)}"
    extents = [extent for split in splits for extent in (split.width, split.height) if extent]
    if any(extent.min != extent.max for extent in extents):
        yield (
            f"found images of several sizes, edges from {min(extent.min for extent in extents)} to "
            f"{max(extent.max for extent in extents)} pixels: training crops and resizes them"
        )


def trait_warnings(traits: Mapping[str, int]) -> Iterator[str]:
    """What of the images training does not see as an image viewer shows it."""
    for trait, images in traits.items():
        yield f"found {counted(images, 'image')} with {trait}"


def _other_labels(pairs: Duplicates) -> str:
    return f" ({pairs.of_other_label} under another label)" if pairs.of_other_label else ""
