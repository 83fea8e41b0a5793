"""`zscl data check`: what was found in a task folder, as tables, and a few of its images as a picture."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrate.runs.progress import ProgressBar
from schemas.dataset_report import Duplicates, PixelRange, DatasetReport, SplitFinding
from schemas.errors import format_count
from zscl.checks.contact_sheet import ContactRow, contact_rows
from zscl.checks.scan import inspect_task
from zscl.checks.task_scan import ScannedTask, scan_task
from zscl.runtime.atomic_io import atomic_file

BAR_DELAY_SECONDS = 1.0
CLASSES_IN_FULL = 40
FEWEST_CLASSES = 20
DOTS_PER_INCH = 120
CELL_PIXELS = 112
PICTURE_CLASSES = 24
BACKGROUND = "#ececec"


def check_task(folder: str, picture: Path | None, per_class: int, console: Console) -> DatasetReport:
    """Look at a task folder, and draw a contact sheet of it where a file is given for one.

    Raises:
        InputError: the folder is no task at all.
    """
    with delayed_progress_bars(console) as progress:
        opened = scan_task(folder, progress)
        finding = inspect_task(opened, progress)
    if picture is not None:
        write_picture(opened, finding, per_class, picture)
    return finding


@contextmanager
def delayed_progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Give a way to report work done; a kind of work that takes longer than a second gets a bar."""
    started: dict[str, float] = {}
    bars: dict[str, ProgressBar] = {}
    with ExitStack() as shown:

        def report(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            if what not in bars and now - started.setdefault(what, now) >= BAR_DELAY_SECONDS:
                shown.close()  # a terminal has room for one at a time
                bars[what] = shown.enter_context(ProgressBar(console, total))
            if what in bars:
                bars[what].update(what, done, total)

        yield report


# --------------------------------------------------------------------------------------------------- tables


def print_inspection(finding: DatasetReport, console: Console) -> None:
    """Print the finding: figures first, then what is wrong, and the verdict last."""
    classes = format_count(len(finding.classnames.names), "class", "classes")
    templates = format_count(len(finding.templates.templates), "template")
    console.print(f"{finding.path}: {classes}, {templates}", style="bold", soft_wrap=True)
    for table in _tables(finding):
        console.print(table)
    for kind, style, sentences in (("problem", "red", finding.problems), ("warning", "yellow", finding.warnings)):
        for sentence in sentences:  # each on a line of its own, for grep
            console.print(Text.assemble((kind, style), f"  {sentence}"), soft_wrap=True)
    problems, warnings = format_count(len(finding.problems), "problem"), format_count(len(finding.warnings), "warning")
    console.print(f"{problems}, {warnings}", style="bold red" if finding.problems else "bold green")


def _tables(finding: DatasetReport) -> Iterator[RenderableType]:
    yield _splits(finding.splits)
    yield _classes(finding)
    if finding.unreadable.samples:
        yield _unreadable(finding)
    if finding.between_splits.pairs:
        yield _duplicates("Test images that are training images too", finding.between_splits)
    if finding.within_splits.pairs:
        yield _duplicates("Images that are in a split twice", finding.within_splits)
    yield _shards(finding)


def _table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title))
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table


def _splits(splits: Sequence[SplitFinding]) -> Table:
    table = _table("Splits (smallest–median–largest)", ["split"], ["shards", "images", "of a class", "width", "height"])
    table.add_column("formats")
    for split in splits:
        counts = sorted(split.per_class)
        a_class = f"{counts[0]}–{counts[(len(counts) - 1) // 2]}–{counts[-1]}"
        formats = f"{', '.join(split.formats)} ({', '.join(split.modes)})" if split.formats else "–"
        table.add_row(
            split.split,
            str(split.shards),
            str(split.images),
            a_class,
            _extent(split.width),
            _extent(split.height),
            formats,
        )
    return table


def _extent(extent: PixelRange | None) -> str:
    if extent is None:
        return "–"
    return str(extent.min) if extent.min == extent.max else f"{extent.min}–{extent.median}–{extent.max}"


def _classes(finding: DatasetReport) -> Table:
    counts = list(zip(*(split.per_class for split in finding.splits), strict=True))
    labels = list(range(len(counts)))
    title = "Images of each class"
    if len(labels) > CLASSES_IN_FULL:
        labels = sorted(labels, key=lambda label: (min(counts[label]), label))[:FEWEST_CLASSES]
        title = f"Images of the {FEWEST_CLASSES} classes that have fewest (--json: of all {len(counts)})"
    table = _table(title, [], ["label"])
    table.add_column("class", overflow="fold")
    for split in finding.splits:
        table.add_column(split.split, justify="right")
    for label in labels:
        cells = (Text(str(count), style="" if count else "bold red") for count in counts[label])
        table.add_row(str(label), finding.classnames.names[label], *cells)
    return table


def _unreadable(finding: DatasetReport) -> Table:
    found = finding.unreadable
    table = _table(f"Samples that cannot be used{_first(found.samples, len(found.first))}", ["shard", "key", "reason"])
    table.add_column("detail", overflow="fold")
    for sample in found.first:
        table.add_row(sample.shard, sample.key, sample.reason, sample.detail)
    return table


def _duplicates(title: str, found: Duplicates) -> Table:
    table = _table(f"{title}{_first(found.pairs, len(found.first))}", ["first", "key", "again", "key", "labels"])
    for pair in found.first:
        first, again = pair.first, pair.again
        labels = f"{_label(first.label)}, {_label(again.label)}" if first.label != again.label else _label(first.label)
        table.add_row(first.shard, first.key, again.shard, again.key, labels)
    return table


def _label(label: int | None) -> str:
    return "–" if label is None else str(label)


def _first(count: int, listed: int) -> str:
    return f": the first {listed} of {count}" if listed < count else f": {count}"


def _shards(finding: DatasetReport) -> Text:
    wrong = [shard.shard for shard in finding.shards if shard.problems]
    if wrong:
        return Text(f"shards: {len(wrong)} of {len(finding.shards)} not as they should be: {', '.join(wrong)}")
    against = "sizes and SHA-256 as zscl.json says" if finding.manifest else "no zscl.json to compare with"
    return Text(f"shards: {len(finding.shards)} whole, {against}")


# ----------------------------------------------------------------------------------------------- the picture


def write_picture(opened: ScannedTask, finding: DatasetReport, per_class: int, file: Path) -> None:
    """Write a contact sheet of a task as PNG."""
    rows = contact_rows(opened, per_class, PICTURE_CLASSES, CELL_PIXELS)
    train, test = (split.images for split in finding.splits)
    classes = len(finding.classnames.names)
    shown = f"{len(rows)} of {classes} classes" if len(rows) < classes else f"{classes} classes"
    title = f"{finding.task}: {shown}, {train} training and {test} test images"
    with atomic_file(file) as temporary:
        draw_contact_sheet(title, rows, per_class).savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def draw_contact_sheet(title: str, rows: Sequence[ContactRow], per_class: int) -> Figure:
    """A few images of each class under the prompt that names it, the classes in columns from top to bottom."""
    columns = 1 if len(rows) <= 4 else 2 if len(rows) <= 12 else 3
    lines = -(-len(rows) // columns)
    gap, prompt, margin, head = 4, 24, 14, 36
    block_width, block_height = per_class * (CELL_PIXELS + gap) + 2 * margin, CELL_PIXELS + prompt + 10
    width, height = max(columns * block_width, 480), head + lines * block_height + margin
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), facecolor="white")
    _write(figure, margin / width, 1 - head / 2 / height, title, 9.5, "bold")
    for number, row in enumerate(rows):
        column, line = divmod(number, lines)
        left, top = column * block_width + margin, head + line * block_height
        _write(figure, left / width, 1 - (top + prompt / 2) / height, _fitted(row.prompt, block_width), 7.5, "normal")
        for index in range(per_class if row.images else 1):
            corner = (left + index * (CELL_PIXELS + gap)) / width, 1 - (top + prompt + CELL_PIXELS) / height
            axes = figure.add_axes((*corner, CELL_PIXELS / width, CELL_PIXELS / height))
            if index < len(row.images):
                _draw_image(axes, row.images[index])
            else:
                axes.set_axis_off()
                axes.text(0, 0.5, "" if row.images else "no training image", fontsize=7, color="firebrick")
    return figure


def _draw_image(axes: Axes, image: Image.Image) -> None:
    """Draw an image in the middle of its cell, in its own proportions."""
    axes.imshow(image, interpolation="nearest")
    edge = max(image.size)
    axes.set_xlim((image.width - edge) / 2 - 0.5, (image.width + edge) / 2 - 0.5)
    axes.set_ylim((image.height + edge) / 2 - 0.5, (image.height - edge) / 2 - 0.5)
    axes.set(xticks=[], yticks=[], facecolor=BACKGROUND)
    axes.spines[:].set_visible(False)


def _write(figure: Figure, x: float, y: float, text: str, size: float, weight: str) -> None:
    # parse_math: a prompt with two dollar signs is no formula
    figure.text(x, y, text, fontsize=size, fontweight=weight, va="center", parse_math=False)


def _fitted(prompt: str, pixels: int) -> str:
    characters = pixels // 7
    return prompt if len(prompt) <= characters else f"{prompt[: characters - 1]}…"
