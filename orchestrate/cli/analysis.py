"""Verbs that look at what runs left: sent to MLflow, compared, judged again, averaged again."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrate.cli.options import AsJson, compare_and_print, print_result, print_note, single_or_list, progress_console
from orchestrate.cli.terminal import stdout_console


def sync(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or searches, on which nobody works.")],
    uri: Annotated[str | None, typer.Option(help="MLflow tracking URI. Default: that of the run's recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send to MLflow what it does not have yet of runs: what was run offline, or while it was away.

    Example: zscl sync runs/demo/finetune runs/demo/zscl
    """
    from orchestrate.lifecycle.paths import SEARCH
    from orchestrate.runs.progress import ProgressBar
    from orchestrate.search.tracking import sync_search
    from orchestrate.tracking import uploader as shipping

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for run in runs:
        with ProgressBar(progress_console) as bar:
            if (run / SEARCH).is_file():
                synced = sync_search(
                    run.absolute(), uri, lambda name, *how_far, bar=bar: bar.update(f"sending {name}", *how_far)
                )
            else:
                synced = shipping.sync_run(run, uri, partial(bar.update, f"sending {run.name}"))
        contents.append(synced.model_dump())
        lines.append(f"{run}: {synced.entries} entries sent to {synced.tracking_uri}, {synced.status}")
    print_result(single_or_list(contents, "runs"), as_json, lines)


def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Folders of runs, or their ids in MLflow.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write. Default: beside the first run, comparison/ID, with an ID for these runs."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="Also the runs in MLflow that this search expression finds.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or runs/mlflow.db.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Method that the others' differences are from. Default: finetune, else zero-shot, else the first."
        ),
    ] = None,
    published: Annotated[str | None, typer.Option(help="Beside the paper's figures for MTIL, order I or II.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not leave the page with the runs in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare what runs forget, by method, over seeds and orders: tables, LaTeX, and one page to look at.

    Example: zscl compare runs/demo/finetune runs/demo/zscl
    """
    from orchestrate.lifecycle.paths import check_writable
    from orchestrate.tracking.lookup import find_runs, place_of

    if out is not None:
        check_writable(out.absolute())
    found = find_runs(runs or [], where, uri)
    folder = (out or place_of(found)).absolute()
    check_writable(folder)
    content, lines = compare_and_print(found, folder, as_json, offline, published, baseline)
    print_result(content, as_json, lines)


def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="A run's folder, a model's folder, or open_clip's name of one.")
    ],
    stage: Annotated[
        str | None, typer.Option(help="Of a run: which stage's model (0: the initial one), or all. Default: the last.")
    ] = None,
    task: Annotated[list[str], typer.Option(help="Task to judge on; repeatable. Default: those of the run.")] = [],  # noqa: B006
    suite: Annotated[
        list[str], typer.Option(help="Further task, whose classes join no others', to watch for drift; repeatable.")
    ] = [],  # noqa: B006
    protocol: Annotated[str, typer.Option(help="By commas.")] = "task-aware,task-agnostic",
    pretrained: Annotated[str | None, typer.Option(help="Of open_clip's name: tag or weights file.")] = None,
    templates: Annotated[
        str | None, typer.Option(help="Averaged into a class embedding: all or first. Default: as the run, or all.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: as the run, or fp32.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 256,
    loader_processes: Annotated[int, typer.Option(min=0, help="Processes that read and decode. 0: none beside.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: evaluation/ in the run, or runs/evaluation.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Leave nothing in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge any model on any tasks: among each one's classes, and among those of all; confusions, calibration.

    Example: zscl evaluate runs/demo/zscl --stage all
    """
    from orchestrate.analysis import evaluate as judging
    from orchestrate.lifecycle.paths import check_writable

    options = judging.parse_options(protocol, templates, precision, batch_size, loader_processes)
    subject = judging.resolve_target(what, pretrained, stage, task, suite)
    folder = (out or (subject.run / "evaluation" if subject.run else Path("runs/evaluation"))).absolute()
    check_writable(folder)
    found = judging.evaluate(subject, options, progress_console)
    written = judging.write_evaluation(found, folder)
    if not as_json:
        stdout_console().print(judging.evaluation_tables(found))
    if subject.run is not None and not offline:
        judging.record_evaluation(found, subject, options, list(written.values()), print_note)
    lines = [f"{kind:11} {file}" for kind, file in written.items()]
    print_result({"evaluation": found.model_dump(mode="json"), "files": written}, as_json, lines)


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with compute.snapshots_every set.")],
    every: Annotated[str, typer.Option(help="Steps from one merge to the next, by commas.")],
    stage: Annotated[
        int | None, typer.Option(help="Which stage, from 1. Default: the last one with snapshots.")
    ] = None,
    kind: Annotated[str, typer.Option(help="mean, exponential, none (the last weights), by commas.")] = "mean,none",
    decay: Annotated[float, typer.Option(help="Of an exponential average.")] = 0.9,
    share: Annotated[str, typer.Option(help="Shares of the anchor merged in behind, by commas.")] = "0",
    anchor: Annotated[str, typer.Option(help="stage_start or initial.")] = "stage_start",
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: averages/<k>-<task>/ in the run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge other averages and interpolations of a stage's weights, without training.

    Example: zscl average runs/own-snapshots --every 5,10 --kind mean,exponential,none --share 0,0.3
    """
    from orchestrate.analysis import replay_averages as averages
    from orchestrate.lifecycle.paths import check_writable

    wanted = averages.parse_grid(every, kind, decay, share, anchor)
    found_stage = averages.ReplayedStage.open(run.absolute(), stage)
    found_stage.check_intervals(wanted)
    check_writable((out or run).absolute())
    found = averages.replay_grid(found_stage, wanted, progress_console)
    place = f"averages/{found.stage}-{found.task}"
    written = averages.write_averages(found, (out or run / place).absolute())
    if not as_json:
        stdout_console().print(averages.averages_table(found))
    print_result(
        {"averages": found.model_dump(mode="json"), "files": written},
        as_json,
        [f"{kind:4} {file}" for kind, file in written.items()],
    )
