"""Messages about problems in a task's data, and warnings, derived from the statistics of the dataset report."""

from collections.abc import Iterator, Mapping, Sequence

from schemas.dataset_report import ClassNames, Duplicates, SplitFinding, Templates, UnreadableSamples
from schemas.errors import format_count, format_names


def class_problems(classnames: ClassNames, splits: Sequence[SplitFinding]) -> Iterator[str]:
    """Yield a message for each problem with classes: a missing name, or classes without images in a split."""
    for label in classnames.empty:
        yield f"classnames.txt: line {label + 1} is empty, expected a class name, because line numbers are labels"
    for split in splits:
        # A label that neither split uses is a warning. An empty split has its own message.
        missing = [label for label in split.empty_classes if label not in classnames.unused]
        if split.shards and not split.images:
            yield f"{split.split}: found no usable sample, expected at least one"
        elif split.images and missing:
            classes = format_names([classnames.names[label] for label in missing], "class", "classes")
            yield f"{split.split}: found no image of {classes}, expected at least one of each"


def template_problems(templates: Templates) -> Iterator[str]:
    """Yield a message for each template that training rejects, because it has no `{c}`."""
    for template in templates.without_place:
        yield f"templates: found {template!r}, expected one with {{c}} for the class name"


def sample_problems(unreadable: UnreadableSamples, between_splits: Duplicates) -> Iterator[str]:
    """Yield messages about samples that training cannot use, and about test images that are also training images."""
    if unreadable.samples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in unreadable.reasons.items())
        yield f"found {format_count(unreadable.samples, 'sample')} that cannot be used ({reasons}), expected none"
    if between_splits.pairs:
        images = format_count(between_splits.pairs, "test image")
        yield f"found {images} among the training images{_different_labels(between_splits)}, expected none"


def task_warnings(
    classnames: ClassNames, templates: Templates, within_splits: Duplicates, splits: Sequence[SplitFinding]
) -> Iterator[str]:
    """Yield warnings about data that may be intended.

    For example, CLIP's own ImageNet class names contain two names that stand for two classes each.

    Args:
        classnames: The class names.
        templates: The prompt templates.
        within_splits: Images that occur more than once in the same split.
        splits: The statistics of the splits.

    Yields:
        One message per warning.
    """
    for repeated in classnames.repeated:
        labels = " and ".join(map(str, repeated.labels))
        yield f"classnames.txt: found {repeated.name!r} for the labels {labels}; prompts cannot distinguish them"
    if classnames.unused and any(split.images for split in splits):
        classes = format_names([classnames.names[label] for label in classnames.unused], "class", "classes")
        yield f"classnames.txt: found {classes} without images in both splits"
    for template in templates.repeated:
        yield f"templates: found {template!r} more than once"
    if within_splits.pairs:
        images = format_count(within_splits.pairs, "image")
        yield f"found {images} repeated within a split{_different_labels(within_splits)}"
    extents = [extent for split in splits for extent in (split.width, split.height) if extent]
    if any(extent.min != extent.max for extent in extents):
        yield (
            f"found images of several sizes (edges from {min(extent.min for extent in extents)} to "
            f"{max(extent.max for extent in extents)} pixels); training crops and resizes them"
        )


def trait_warnings(traits: Mapping[str, int]) -> Iterator[str]:
    """Yield a warning for each image property that training ignores (see `zscl.checks.image.TRAITS`)."""
    for trait, images in traits.items():
        yield f"found {format_count(images, 'image')} with {trait}"


def _different_labels(duplicates: Duplicates) -> str:
    return f" ({duplicates.of_other_label} with another label)" if duplicates.of_other_label else ""
