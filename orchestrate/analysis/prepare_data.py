"""Preparation of data (`zscl data prepare`, `zscl data fetch`): choice of the source, parallel work, progress bars."""

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
from schemas.errors import ErrorCode, InputError, InterruptedRunError
from zscl.data.sample import printable_name
from zscl.datasets import clip_benchmark, mtil
from zscl.datasets.captions import WrittenCaptions, write_captions
from zscl.datasets.image_folder import DEFAULT_TEMPLATE, prepare_folder
from zscl.datasets.imagenet import prepare_imagenet, prepare_tinyimagenet
from zscl.datasets.mtil import MTIL
from zscl.datasets.sources import SPLIT_SEED, PreparedTask, check_name
from zscl.datasets.synthetic.suites import write_embedded

ALL_TASKS = "mtil"
# Sources other than the tasks of MTIL, with the argument that follows the name on the command line.
SOURCES = {"embedded": "", "folder": "DIR", "tinyimagenet": "DIR", "imagenet": "DIR", "captions": "FILE"}
OPTIONS: Mapping[str, set[str]] = {  # the options that each source uses
    "embedded": {"corpus"},
    "folder": {"template", "seed"},
    "tinyimagenet": set(),
    "imagenet": {"classes"},
    "captions": {"column"},
    ALL_TASKS: {"root", "jobs"},
}
Outcome = PreparedTask | InputError


def prepare_data(
    names: Sequence[str], out: Path, options: Mapping[str, Any], console: Console
) -> tuple[dict[str, Any], list[str]]:
    """Prepare tasks or a reference set from a source of data.

    Args:
        names: Names of MTIL's tasks, or `mtil` for all of them; or the name of another source (see `SOURCES`), followed
            by its argument.
        out: Output folder.
        options: Mapping from the command's options that were set to their values.
        console: Console for progress.

    Returns:
        The prepared data as a JSON dictionary and as lines of text.

    Raises:
        InputError: A name is unknown, an option does not belong to the source, or the source has unexpected content.
        InterruptedRunError: A signal such as Ctrl-C stopped the work.
    """
    if not str(out).isprintable():
        raise InputError(
            f"--out: found {printable_name(str(out))!r}, expected a path of printable characters",
            code=ErrorCode.INVALID_VALUE,
            field="--out",
        )
    source, *arguments = [check_name("data prepare", names[0], [*MTIL, ALL_TASKS, *SOURCES]), *names[1:]]
    _check_options(source, OPTIONS[source if source in SOURCES else ALL_TASKS], options)
    if source in SOURCES and len(arguments) != bool(SOURCES[source]):
        usage = f"zscl data prepare {source} {SOURCES[source]}".rstrip()
        raise InputError(f"data prepare: found '{' '.join(names)}', expected '{usage}'", code=ErrorCode.INVALID_VALUE)
    path = Path(arguments[0]).expanduser() if arguments else Path()
    match source:
        case "embedded":
            corpus = bool(options.get("corpus"))
            folders = list(map(str, write_embedded(out, corpus, lambda text: console.print(text, highlight=False))))
            return {"folders": folders}, folders
        case "captions":
            return _describe_captions(write_captions(path, out, options.get("column")), out)
        case "folder":
            templates, seed = options.get("template", [DEFAULT_TEMPLATE]), options.get("seed", SPLIT_SEED)
            return _describe_tasks([prepare_folder(path.absolute(), out, templates, seed)])
        case "tinyimagenet":
            return _describe_tasks([prepare_tinyimagenet(path, out)])
        case "imagenet":
            return _describe_tasks([prepare_imagenet(path, out, options.get("classes"))])
        case _:
            tasks, root = expand_task_names("data prepare", names), options.get("root")
            mtil.check_copies(tasks, out, root)
            return _describe_tasks(run_tasks(_prepare_task, tasks, (out, root), options.get("jobs"), console))


def fetch_tasks(
    names: Sequence[str], out: Path, jobs: int | None, console: Console
) -> tuple[dict[str, Any], list[str]]:
    """Download tasks from the copies that CLIP_benchmark publishes.

    Args:
        names: Names of tasks, or `mtil` for all tasks of MTIL.
        out: Output folder.
        jobs: Number of tasks to download in parallel; default: one per CPU core.
        console: Console for progress.

    Returns:
        The downloaded tasks, with notes on how they differ from the published data, as a JSON dictionary and as lines
        of text.

    Raises:
        InputError: A name is unknown, or a copy cannot be downloaded or is damaged.
        InterruptedRunError: A signal such as Ctrl-C stopped the work.
    """
    tasks = expand_task_names("data fetch", names, clip_benchmark.DRIFT_COPIES)
    return _describe_tasks(run_tasks(_fetch_task, tasks, (out,), jobs, console))


def expand_task_names(command: str, names: Sequence[str], others: Collection[str] = ()) -> list[str]:
    """Replace `mtil` by the names of all tasks of MTIL, and remove duplicate names.

    Args:
        command: Name of the command, for error messages.
        names: Names that the user gave.
        others: Names that are allowed in addition to `mtil` and the tasks of MTIL.

    Returns:
        The names of the tasks.

    Raises:
        InputError: A name is unknown.
    """
    allowed = [*MTIL, ALL_TASKS, *others]
    tasks = [task for name in names for task in (MTIL if check_name(command, name, allowed) == ALL_TASKS else [name])]
    return list(dict.fromkeys(tasks))


def _describe_captions(written: WrittenCaptions, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Describe the written captions. The first captions are included, so that the user can check the chosen column."""
    empty = f", {written.empty} empty ones left out" if written.empty else ""
    lines = [f"{out}/captions.txt  {written.captions} captions: {written.origin}{empty}; the first:"]
    return {"file": f"{out}/captions.txt", **asdict(written)}, [*lines, *(f"  {text}" for text in written.first)]


def _describe_tasks(prepared: Sequence[PreparedTask]) -> tuple[dict[str, Any], list[str]]:
    lines = []
    for task in prepared:
        images = ", ".join(f"{count} {split}" for split, count in task.images.items())
        existed = "  (existed before)" if task.kept else ""
        lines.append(f"{task.folder}  {images} images, split {task.split_family}{existed}")
        lines += [f"  {task.name}: {note}" for note in task.notes]
    return {"tasks": [asdict(task) for task in prepared]}, lines


def _check_options(source: str, used: set[str], options: Mapping[str, Any]) -> None:
    for option in options:
        if option not in used:
            [user] = [name for name, used in OPTIONS.items() if option in used]
            expected = "tasks of MTIL" if user == ALL_TASKS else f"'{user}'"
            raise InputError(
                f"--{option} cannot be used with '{source}', only with {expected}",
                code=ErrorCode.UNUSED_SETTING,
                field=f"--{option}",
            )


# -------------------------------------------------------------------------------------------- tasks in parallel

_reports: Any = None  # receives progress reports: a queue in a worker process, `_TaskBars` in the main process


def _report(task: str, done: int, total: int) -> None:
    _reports.put((task, done, total))


def _prepare_task(task: str, out: Path, root: Path | None) -> PreparedTask:
    return mtil.prepare(task, out, root, _report)


def _fetch_task(task: str, out: Path) -> PreparedTask:
    return clip_benchmark.fetch(task, out)


def _report_to(reports: Any) -> None:
    global _reports
    _reports = reports


def _start_worker(reports: Any) -> None:
    for number in (*TERMINATION_SIGNALS, *WARNING_SIGNALS):  # only the main process reports a signal
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    _report_to(reports)


def run_tasks(
    work: Callable[..., PreparedTask],
    tasks: Sequence[str],
    arguments: tuple[Any, ...],
    jobs: int | None,
    console: Console,
) -> list[PreparedTask]:
    """Call a function once for every task, in several processes.

    Args:
        work: The function. Its first argument is the task's name.
        tasks: Names of the tasks.
        arguments: The function's arguments after the task's name.
        jobs: Maximum number of processes; default: one per CPU core.
        console: Console for progress.

    Returns:
        The prepared tasks, in the order of `tasks`.

    Raises:
        InputError: A task failed. The error is raised when all other tasks have ended. Its message is that of the first
            failed task.
        InterruptedRunError: A signal such as Ctrl-C stopped the work. Finished tasks are kept.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    with _TaskBars(console) as bars:
        try:
            if jobs == 1:
                outcomes = _run_in_process(work, tasks, arguments, bars)
            else:
                outcomes = _run_in_pool(work, tasks, arguments, jobs, bars)
        except (KeyboardInterrupt, InterruptedRunError) as error:
            message = "finished tasks are kept; the same command prepares the others"
            code = error.exit_code if isinstance(error, InterruptedRunError) else 128 + signal.SIGINT
            raise InterruptedRunError(message, exit_code=code) from None
    failed = {task: outcome for task, outcome in outcomes.items() if isinstance(outcome, InputError)}
    if failed:
        first, *others = failed
        also = f" ({', '.join(others)} failed, too)" if others else ""
        raise InputError(f"{failed[first]}{also}", code=failed[first].code, field=failed[first].field)
    return [outcome for outcome in outcomes.values() if isinstance(outcome, PreparedTask)]


def _run_in_process(
    work: Callable[..., PreparedTask], tasks: Sequence[str], arguments: tuple[Any, ...], bars: "_TaskBars"
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    _report_to(bars)
    for task in tasks:
        try:
            outcomes[task] = work(task, *arguments)
        except InputError as error:
            outcomes[task] = error
        bars.finish(task, outcomes[task])
    return outcomes


def _run_in_pool(
    work: Callable[..., PreparedTask], tasks: Sequence[str], arguments: tuple[Any, ...], jobs: int, bars: "_TaskBars"
) -> dict[str, Outcome]:
    # Threads of torch do not survive a fork, and the fork server has none. It also imports slow modules only once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision"])
    reports = context.Queue()
    outcomes: dict[str, Outcome] = {}
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(reports,)) as pool:
        running = {pool.submit(work, task, *arguments): task for task in tasks}
        try:
            while running:
                with suppress(queue.Empty):
                    bars.put(reports.get(timeout=0.2))
                for future in [future for future in running if future.done()]:
                    task = running.pop(future)
                    error = future.exception()
                    outcomes[task] = error if isinstance(error, InputError) else future.result()
                    bars.finish(task, outcomes[task])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {task: outcomes[task] for task in tasks}


class _TaskBars:
    """Shows the progress of tasks: one progress bar per task on a terminal, one line per task in a log."""

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

    def __enter__(self) -> "_TaskBars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def put(self, progress: tuple[str, int, int]) -> None:
        """Show the progress of a task: a tuple of its name, the number of written images, and the total number."""
        task, done, total = progress
        if task not in self._bars:
            self._bars[task] = self._progress.add_task(task, total=total)
        self._progress.update(self._bars[task], completed=done)

    def finish(self, task: str, outcome: Outcome) -> None:
        """Print the outcome of a task."""
        if isinstance(outcome, InputError):
            message = "failed"
        else:
            message = f"{sum(outcome.images.values())} images {'kept' if outcome.kept else 'written'}"
        self.console.print(f"{task}: {message}", highlight=False)
