"""Check of a task's data (`zscl data check`): tables of samples, classes and problems, and a contact sheet."""

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
from schemas.dataset_report import DatasetReport, Duplicates, PixelRange, SplitFinding
from schemas.errors import format_count
from zscl.checks.contact_sheet import ContactRow, contact_rows
from zscl.checks.scan import inspect_task
from zscl.checks.task_scan import ScannedTask, scan_task
from zscl.runtime.atomic_io import atomic_file

BAR_DELAY_SECONDS = 1.0
MAX_CLASSES_IN_TABLE = 40  # for tasks with more classes, only the smallest ones are listed
SMALLEST_CLASSES = 20
DOTS_PER_INCH = 120
CELL_PIXELS = 112
MAX_CLASSES_ON_SHEET = 24
BACKGROUND = "#ececec"


def check_task(folder: str, picture: Path | None, per_class: int, console: Console) -> DatasetReport:
    """Check every sample of a task, and optionally draw a contact sheet.

    Args:
        folder: The task's folder or URL.
        picture: PNG file for the contact sheet; `None` to draw none.
        per_class: Number of images per class on the contact sheet.
        console: Console for progress.

    Returns:
        The report on the task's samples, classes and problems.

    Raises:
        InputError: The folder does not contain a task.
    """
    with delayed_progress_bars(console) as progress:
        scanned = scan_task(folder, progress)
        report = inspect_task(scanned, progress)
    if picture is not None:
        write_contact_sheet(scanned, report, per_class, picture)
    return report


@contextmanager
def delayed_progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Context manager: show a progress bar for each phase of the work that takes longer than `BAR_DELAY_SECONDS`.

    Args:
        console: Console for the progress bars.

    Yields:
        A callback for progress. Its arguments are the name of the phase, the number of finished items, and the total.
    """
    started: dict[str, float] = {}
    bars: dict[str, ProgressBar] = {}
    with ExitStack() as stack:

        def report(work: str, done: int, total: int) -> None:
            now = time.monotonic()
            if work not in bars and now - started.setdefault(work, now) >= BAR_DELAY_SECONDS:
                stack.close()  # a terminal shows one bar at a time
                bars[work] = stack.enter_context(ProgressBar(console, total))
            if work in bars:
                bars[work].update(work, done, total)

        yield report


# --------------------------------------------------------------------------------------------------- tables


def print_report(report: DatasetReport, console: Console) -> None:
    """Print a report: its tables, its problems and warnings, and the number of problems and warnings.

    Args:
        report: The report.
        console: Console for the report.
    """
    classes = format_count(len(report.classnames.names), "class", "classes")
    templates = format_count(len(report.templates.templates), "template")
    console.print(f"{report.path}: {classes}, {templates}", style="bold", soft_wrap=True)
    for table in _tables(report):
        console.print(table)
    for kind, style, messages in (("problem", "red", report.problems), ("warning", "yellow", report.warnings)):
        for message in messages:  # one line per message, so that grep can be used
            console.print(Text.assemble((kind, style), f"  {message}"), soft_wrap=True)
    problems, warnings = format_count(len(report.problems), "problem"), format_count(len(report.warnings), "warning")
    console.print(f"{problems}, {warnings}", style="bold red" if report.problems else "bold green")


def _tables(report: DatasetReport) -> Iterator[RenderableType]:
    yield _splits_table(report.splits)
    yield _classes_table(report)
    if report.unreadable.samples:
        yield _unreadable_table(report)
    if report.between_splits.pairs:
        yield _duplicates_table("Test images that are also training images", report.between_splits)
    if report.within_splits.pairs:
        yield _duplicates_table("Images that occur twice in a split", report.within_splits)
    yield _shards_line(report)


def _table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title))
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table


def _splits_table(splits: Sequence[SplitFinding]) -> Table:
    columns = ["shards", "images", "per class", "width", "height"]
    table = _table("Splits (smallest–median–largest)", ["split"], columns)
    table.add_column("formats")
    for split in splits:
        counts = sorted(split.per_class)
        per_class = f"{counts[0]}–{counts[(len(counts) - 1) // 2]}–{counts[-1]}"
        formats = f"{', '.join(split.formats)} ({', '.join(split.modes)})" if split.formats else "–"
        sizes = (_format_range(split.width), _format_range(split.height))
        table.add_row(split.split, str(split.shards), str(split.images), per_class, *sizes, formats)
    return table


def _format_range(pixels: PixelRange | None) -> str:
    if pixels is None:
        return "–"
    return str(pixels.min) if pixels.min == pixels.max else f"{pixels.min}–{pixels.median}–{pixels.max}"


def _classes_table(report: DatasetReport) -> Table:
    counts = list(zip(*(split.per_class for split in report.splits), strict=True))
    labels = list(range(len(counts)))
    title = "Images of each class"
    if len(labels) > MAX_CLASSES_IN_TABLE:
        labels = sorted(labels, key=lambda label: (min(counts[label]), label))[:SMALLEST_CLASSES]
        title = f"Images of the {SMALLEST_CLASSES} smallest classes (--json: of all {len(counts)})"
    table = _table(title, [], ["label"])
    table.add_column("class", overflow="fold")
    for split in report.splits:
        table.add_column(split.split, justify="right")
    for label in labels:
        cells = (Text(str(count), style="" if count else "bold red") for count in counts[label])
        table.add_row(str(label), report.classnames.names[label], *cells)
    return table


def _unreadable_table(report: DatasetReport) -> Table:
    unreadable = report.unreadable
    title = f"Samples that cannot be used{_format_listed(unreadable.samples, len(unreadable.first))}"
    table = _table(title, ["shard", "key", "reason"])
    table.add_column("detail", overflow="fold")
    for sample in unreadable.first:
        table.add_row(sample.shard, sample.key, sample.reason, sample.detail)
    return table


def _duplicates_table(title: str, duplicates: Duplicates) -> Table:
    columns = ["first", "key", "again", "key", "labels"]
    table = _table(f"{title}{_format_listed(duplicates.pairs, len(duplicates.first))}", columns)
    for pair in duplicates.first:
        first, again = pair.first, pair.again
        labels = dict.fromkeys((_format_label(first.label), _format_label(again.label)))
        table.add_row(first.shard, first.key, again.shard, again.key, ", ".join(labels))
    return table


def _format_label(label: int | None) -> str:
    return "–" if label is None else str(label)


def _format_listed(count: int, listed: int) -> str:
    return f": the first {listed} of {count}" if listed < count else f": {count}"


def _shards_line(report: DatasetReport) -> Text:
    bad = [shard.shard for shard in report.shards if shard.problems]
    if bad:
        return Text(f"shards: {len(bad)} of {len(report.shards)} with problems: {', '.join(bad)}")
    compared = "sizes and SHA-256 match zscl.json" if report.manifest else "no zscl.json to compare with"
    return Text(f"shards: {len(report.shards)} complete, {compared}")


# --------------------------------------------------------------------------------------------- contact sheet


def write_contact_sheet(scanned: ScannedTask, report: DatasetReport, per_class: int, file: Path) -> None:
    """Write a contact sheet of a task as PNG.

    Args:
        scanned: The scanned task, whose images are shown.
        report: The task's report, for the title.
        per_class: Number of images per class.
        file: The PNG file.
    """
    rows = contact_rows(scanned, per_class, MAX_CLASSES_ON_SHEET, CELL_PIXELS)
    train, test = (split.images for split in report.splits)
    classes = len(report.classnames.names)
    shown = f"{len(rows)} of {classes} classes" if len(rows) < classes else f"{classes} classes"
    title = f"{report.task}: {shown}, {train} training and {test} test images"
    with atomic_file(file) as temporary:
        draw_contact_sheet(title, rows, per_class).savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def draw_contact_sheet(title: str, rows: Sequence[ContactRow], per_class: int) -> Figure:
    """Draw a contact sheet: for each class, its prompt and a few images under it.

    The classes are arranged in columns, from top to bottom.

    Args:
        title: Title of the sheet.
        rows: The classes, with their prompts and images.
        per_class: Number of images per class.

    Returns:
        The figure.
    """
    columns = 1 if len(rows) <= 4 else 2 if len(rows) <= 12 else 3
    lines = -(-len(rows) // columns)
    gap, prompt, margin, head = 4, 24, 14, 36  # pixels
    block_width, block_height = per_class * (CELL_PIXELS + gap) + 2 * margin, CELL_PIXELS + prompt + 10
    width, height = max(columns * block_width, 480), head + lines * block_height + margin
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), facecolor="white")
    _draw_text(figure, margin / width, 1 - head / 2 / height, title, 9.5, "bold")
    for number, row in enumerate(rows):
        column, line = divmod(number, lines)
        left, top = column * block_width + margin, head + line * block_height
        text = _truncate(row.prompt, block_width)
        _draw_text(figure, left / width, 1 - (top + prompt / 2) / height, text, 7.5, "normal")
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
    """Draw an image in the centre of its cell without changing its aspect ratio."""
    axes.imshow(image, interpolation="nearest")
    edge = max(image.size)
    axes.set_xlim((image.width - edge) / 2 - 0.5, (image.width + edge) / 2 - 0.5)
    axes.set_ylim((image.height + edge) / 2 - 0.5, (image.height - edge) / 2 - 0.5)
    axes.set(xticks=[], yticks=[], facecolor=BACKGROUND)
    axes.spines[:].set_visible(False)


def _draw_text(figure: Figure, x: float, y: float, text: str, size: float, weight: str) -> None:
    # parse_math=False: Matplotlib would read the text between two dollar signs in a prompt as a formula.
    figure.text(x, y, text, fontsize=size, fontweight=weight, va="center", parse_math=False)


def _truncate(prompt: str, pixels: int) -> str:
    characters = pixels // 7
    return prompt if len(prompt) <= characters else f"{prompt[: characters - 1]}…"
