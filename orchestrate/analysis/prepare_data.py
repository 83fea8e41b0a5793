"""The verbs of `zscl data`: which names make what, several tasks at once, and what is said while it goes on."""

import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from orchestrate.lifecycle.signals import TERMINATION_SIGNALS, WARNING_SIGNALS
from schemas.errors import InputError, InterruptedRunError
from zscl.data.sample import printable_name
from zscl.datasets import captions, mtil, sources
from zscl.datasets import clip_benchmark as copies
from zscl.datasets.image_folder import DEFAULT_TEMPLATE, prepare_folder
from zscl.datasets.imagenet import prepare_imagenet, prepare_tinyimagenet
from zscl.datasets.mtil import MTIL
from zscl.datasets.sources import PreparedTask, check_name
from zscl.datasets.synthetic.suites import write_embedded

ALL = "mtil"
# What a name other than a task's is followed by, and the options that something reads there.
OTHERS = {"embedded": "", "folder": "DIR", "tinyimagenet": "DIR", "imagenet": "DIR", "captions": "FILE"}
OPTIONS: Mapping[str, set[str]] = {
    "embedded": {"corpus"},
    "folder": {"template", "seed"},
    "tinyimagenet": set(),
    "imagenet": {"classes"},
    "captions": {"column"},
    ALL: {"root", "jobs"},
}


def prepare_data(
    names: Sequence[str], out: Path, options: Mapping[str, Any], console: Console
) -> tuple[dict[str, Any], list[str]]:
    """Make data, and say what lies where, for programs and for people.

    Args:
        names: tasks or `mtil`, or one of the others with what follows it.
        out: where to.
        options: those given, by name; what nothing would read is refused.
        console: for progress.

    Raises:
        InputError: an unknown name, an option that does not belong to it, or a source that is not what it should be.
        InterruptedRunError: Ctrl-C.
    """
    if not str(out).isprintable():
        raise InputError(f"--out: found {printable_name(str(out))!r}, expected a path of printable characters")
    what, *rest = [check_name("data prepare", names[0], [*MTIL, ALL, *OTHERS]), *names[1:]]
    _check_options(what, OPTIONS[what if what in OTHERS else ALL], options)
    if what in OTHERS and len(rest) != bool(OTHERS[what]):
        form = f"zscl data prepare {what} {OTHERS[what]}".rstrip()
        raise InputError(f"data prepare: found '{' '.join(names)}', expected '{form}'")
    match what:
        case "embedded":
            places = write_embedded(out, bool(options.get("corpus")), lambda text: console.print(text, highlight=False))
            return {"folders": [str(place) for place in places]}, [str(place) for place in places]
        case "captions":
            return _captions(captions.write_captions(Path(rest[0]).expanduser(), out, options.get("column")), out)
        case "folder":
            images, templates = Path(rest[0]).expanduser(), options.get("template", [DEFAULT_TEMPLATE])
            seed = options.get("seed", sources.SPLIT_SEED)
            return _described([prepare_folder(images.absolute(), out, templates, seed)])
        case "tinyimagenet":
            return _described([prepare_tinyimagenet(Path(rest[0]).expanduser(), out)])
        case "imagenet":
            return _described([prepare_imagenet(Path(rest[0]).expanduser(), out, options.get("classes"))])
        case _:
            tasks, root = task_names("data prepare", names), options.get("root")
            mtil.check_copies(tasks, out, root)
            return _described(run_tasks(_prepare_one, tasks, (out, root), options.get("jobs"), console))


def fetch_tasks(names: Sequence[str], out: Path, jobs: int | None, console: Console) -> tuple[dict[str, Any], list[str]]:
    """Download ready-made copies of tasks, and say what lies where and how it differs.

    Raises:
        InputError: an unknown name, or a copy that cannot be downloaded or is broken.
        InterruptedRunError: Ctrl-C.
    """
    tasks = task_names("data fetch", names, copies.DRIFT_COPIES)
    return _described(run_tasks(_fetch_one, tasks, (out,), jobs, console))


def task_names(what: str, names: Sequence[str], others: Collection[str] = ()) -> list[str]:
    """Tasks meant by names: `mtil` is all of MTIL, and each task comes once.

    Raises:
        InputError: an unknown name.
    """
    allowed = [*MTIL, ALL, *others]
    tasks = [task for name in names for task in (MTIL if check_name(what, name, allowed) == ALL else [name])]
    return list(dict.fromkeys(tasks))


def _captions(written: captions.WrittenCaptions, out: Path) -> tuple[dict[str, Any], list[str]]:
    """What was taken for captions: a wrong column shows in the first ones."""
    empty = f", {written.empty} empty ones left out" if written.empty else ""
    lines = [f"{out}/captions.txt  {written.captions} captions: {written.origin}{empty}; the first:"]
    return {"file": f"{out}/captions.txt", **asdict(written)}, [*lines, *(f"  {text}" for text in written.first)]


def _described(prepared: Sequence[PreparedTask]) -> tuple[dict[str, Any], list[str]]:
    lines = []
    for task in prepared:
        images = ", ".join(f"{count} {split}" for split, count in task.images.items())
        kept = "  (was there)" if task.kept else ""
        lines.append(f"{task.folder}  {images} images, split {task.split_family}{kept}")
        lines += [f"  {task.name}: {note}" for note in task.notes]
    return {"tasks": [asdict(task) for task in prepared]}, lines


def _check_options(what: str, read: set[str], options: Mapping[str, Any]) -> None:
    for option in options:
        if option not in read:
            [reader] = [name for name, read in OPTIONS.items() if option in read]
            shown = "tasks of MTIL" if reader == ALL else f"'{reader}'"
            raise InputError(f"--{option}: found it with '{what}', expected it only with {shown}")


# ------------------------------------------------------------------------------------------ several tasks at once

_reports: Any = None  # what progress is put to: a queue in a worker process, the bars themselves in this one


def _report(task: str, done: int, total: int) -> None:
    _reports.put((task, done, total))


def _prepare_one(task: str, out: Path, root: Path | None) -> PreparedTask:
    return mtil.prepare(task, out, root, _report)


def _fetch_one(task: str, out: Path) -> PreparedTask:
    return copies.fetch(task, out)


def _report_to(reports: Any) -> None:
    global _reports
    _reports = reports


def _start_worker(reports: Any) -> None:
    for number in (*TERMINATION_SIGNALS, *WARNING_SIGNALS):  # they may go to all processes: one speaks of it
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    _report_to(reports)


def run_tasks(
    work: Callable[..., PreparedTask], tasks: Sequence[str], arguments: tuple[Any, ...], jobs: int | None, console: Console
) -> list[PreparedTask]:
    """Work on tasks, each as a whole, `jobs` of them at once in processes of their own.

    Raises:
        InputError: of the first task that has one; the others are finished first.
        InterruptedRunError: Ctrl-C; tasks that are done stay.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    with _Bars(console) as bars:
        try:
            if jobs == 1:
                outcomes = _one_after_another(work, tasks, arguments, bars)
            else:
                outcomes = _side_by_side(work, tasks, arguments, jobs, bars)
        except (KeyboardInterrupt, InterruptedRunError) as error:
            kept = "tasks that were finished are kept; the same command goes on"
            code = error.exit_code if isinstance(error, InterruptedRunError) else 128 + signal.SIGINT
            raise InterruptedRunError(kept, exit_code=code) from None
    failed = [task for task, outcome in outcomes.items() if isinstance(outcome, InputError)]
    if failed:
        also = f" (nor was {', '.join(failed[1:])} made)" if failed[1:] else ""
        raise InputError(f"{outcomes[failed[0]]}{also}")
    return [outcome for outcome in outcomes.values() if isinstance(outcome, PreparedTask)]


def _one_after_another(
    work: Callable[..., PreparedTask], tasks: Sequence[str], arguments: tuple[Any, ...], bars: "_Bars"
) -> dict[str, PreparedTask | InputError]:
    outcomes: dict[str, PreparedTask | InputError] = {}
    _report_to(bars)
    for task in tasks:
        try:
            outcomes[task] = work(task, *arguments)
        except InputError as error:
            outcomes[task] = error
        bars.finish(task, outcomes[task])
    return outcomes


def _side_by_side(
    work: Callable[..., PreparedTask], tasks: Sequence[str], arguments: tuple[Any, ...], jobs: int, bars: "_Bars"
) -> dict[str, PreparedTask | InputError]:
    # Forked off a process that has no threads (torch's do not survive a fork) and has imported what takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision"])
    reports = context.Queue()
    outcomes: dict[str, PreparedTask | InputError] = {}
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(reports,)) as pool:
        waiting = {pool.submit(work, task, *arguments): task for task in tasks}
        try:
            while waiting:
                with suppress(queue.Empty):
                    bars.put(reports.get(timeout=0.2))
                for future in [future for future in waiting if future.done()]:
                    task = waiting.pop(future)
                    error = future.exception()
                    outcomes[task] = error if isinstance(error, InputError) else future.result()
                    bars.finish(task, outcomes[task])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {task: outcomes[task] for task in tasks}


class _Bars:
    """A bar a task on a terminal, a line a task in a log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images · left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_interactive,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def put(self, progress: tuple[str, int, int]) -> None:
        """Show how many of a task's images are written."""
        task, done, total = progress
        if task not in self._bars:
            self._bars[task] = self._progress.add_task(task, total=total)
        self._progress.update(self._bars[task], completed=done)

    def finish(self, task: str, outcome: PreparedTask | InputError) -> None:
        """Say what became of a task."""
        if isinstance(outcome, InputError):
            said = "not made"
        else:
            said = f"{sum(outcome.images.values())} images {'kept' if outcome.kept else 'written'}"
        self.console.print(f"{task}: {said}", highlight=False)
