"""The commands on finished runs: `sync`, `compare`, `evaluate` and `average`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrate.cli.options import (
    AsJson,
    combine_results,
    compare_and_print,
    print_note,
    print_result,
    progress_console,
)
from orchestrate.cli.terminal import create_stdout_console


def sync(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs or searches that are not running.")],
    uri: Annotated[str | None, typer.Option(help="MLflow tracking URI. Default: the one in the run's recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send runs and searches to MLflow. Only records that MLflow does not have yet are sent.

    Example: zscl sync runs/demo/finetune runs/demo/zscl
    """
    from orchestrate.lifecycle.paths import SEARCH
    from orchestrate.runs.progress import ProgressBar
    from orchestrate.search.tracking import sync_search
    from orchestrate.tracking.uploader import sync_run

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for run in runs:
        with ProgressBar(progress_console) as bar:
            if (run / SEARCH).is_file():
                report = sync_search(
                    run.absolute(), uri, lambda trial, *counts, bar=bar: bar.update(f"sending {trial}", *counts)
                )
            else:
                report = sync_run(run, uri, partial(bar.update, f"sending {run.name}"))
        contents.append(report.model_dump())
        lines.append(f"{run}: {report.entries} entries sent to {report.tracking_uri}, {report.status}")
    print_result(combine_results(contents, "runs"), as_json, lines)


def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Folders of runs, or their MLflow run ids.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder. Default: comparison/ID next to the first run; ID depends on the runs."),
    ] = None,
    where: Annotated[str | None, typer.Option(help="Add the MLflow runs that match this search expression.")] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or runs/mlflow.db.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Method to which the others are compared. Default: finetune, else zero-shot, else the first."
        ),
    ] = None,
    published: Annotated[str | None, typer.Option(help="Add the paper's results on MTIL, task order I or II.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not attach the HTML page to the MLflow runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare how much runs forget: tables, LaTeX and an HTML page. Seeds and task orders of a method are grouped.

    Example: zscl compare runs/demo/finetune runs/demo/zscl
    """
    from orchestrate.lifecycle.paths import check_writable
    from orchestrate.tracking.lookup import comparison_folder, find_runs

    if out is not None:
        check_writable(out.absolute())
    folders = find_runs(runs or [], where, uri)
    folder = (out or comparison_folder(folders)).absolute()
    check_writable(folder)
    content, lines = compare_and_print(folders, folder, as_json, offline, published, baseline)
    print_result(content, as_json, lines)


def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="A run's folder, a model's folder, or an open_clip model name.")
    ],
    stage: Annotated[
        str | None, typer.Option(help="Stage of a run (0: the initial model), or all. Default: the last.")
    ] = None,
    task: Annotated[
        list[str], typer.Option(help="Folder of a task to evaluate on; repeatable. Default: the run's tasks.")
    ] = [],  # noqa: B006
    suite: Annotated[
        list[str],
        typer.Option(
            help="Folder of an additional task, to measure distribution shift; its classes are not added to those of "
            "the other tasks; repeatable."
        ),
    ] = [],  # noqa: B006
    protocol: Annotated[str, typer.Option(help="Protocols, separated by commas.")] = "task-aware,task-agnostic",
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip's tag of the weights, or a weights file, for an open_clip model name.")
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(help="Prompt templates averaged per class: all or first. Default: as the run, or all."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: as the run, or fp32.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 256,
    loader_processes: Annotated[
        int, typer.Option(min=0, help="Processes that read and decode images. 0: the main process does it.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Output folder. Default: evaluation/ in the run, or runs/evaluation.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not record the evaluation in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models on tasks: accuracy, confusion and calibration, among the classes of each task or of all tasks.

    Example: zscl evaluate runs/demo/zscl --stage all
    """
    from orchestrate.analysis.evaluate import (
        build_evaluation_tables,
        evaluate_models,
        parse_options,
        record_evaluation,
        resolve_target,
        write_evaluation,
    )
    from orchestrate.lifecycle.paths import check_writable

    options = parse_options(protocol, templates, precision, batch_size, loader_processes)
    target = resolve_target(what, pretrained, stage, task, suite)
    folder = (out or (target.run / "evaluation" if target.run else Path("runs/evaluation"))).absolute()
    check_writable(folder)
    evaluation = evaluate_models(target, options, progress_console)
    files = write_evaluation(evaluation, folder)
    if not as_json:
        create_stdout_console().print(build_evaluation_tables(evaluation))
    if target.run is not None and not offline:
        record_evaluation(evaluation, target, options, list(files.values()), print_note)
    lines = [f"{kind:11} {file}" for kind, file in files.items()]
    print_result({"evaluation": evaluation.model_dump(mode="json"), "files": files}, as_json, lines)


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with compute.snapshots_every set.")],
    every: Annotated[str, typer.Option(help="Averaging intervals in steps, separated by commas.")],
    stage: Annotated[int | None, typer.Option(help="Stage, from 1. Default: the last one with snapshots.")] = None,
    kind: Annotated[
        str, typer.Option(help="Kinds of averages, separated by commas: mean, exponential, none (the last weights).")
    ] = "mean,none",
    decay: Annotated[float, typer.Option(help="Decay of the exponential average.")] = 0.9,
    share: Annotated[str, typer.Option(help="Interpolation weights of the anchor model, separated by commas.")] = "0",
    anchor: Annotated[str, typer.Option(help="Anchor model: stage_start or initial.")] = "stage_start",
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: averages/<k>-<task>/ in the run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate other weight averages of a stage, without training.

    Example: zscl average runs/own-snapshots --every 5,10 --kind mean,exponential,none --share 0,0.3
    """
    from orchestrate.analysis.replay_averages import (
        ReplayedStage,
        build_averages_table,
        parse_grid,
        replay_grid,
        write_averages,
    )
    from orchestrate.lifecycle.paths import check_writable

    grid = parse_grid(every, kind, decay, share, anchor)
    replayed = ReplayedStage.open(run.absolute(), stage)
    replayed.check_intervals(grid)
    check_writable((out or run).absolute())
    averages = replay_grid(replayed, grid, progress_console)
    files = write_averages(averages, (out or run / f"averages/{averages.stage}-{averages.task}").absolute())
    if not as_json:
        create_stdout_console().print(build_averages_table(averages))
    lines = [f"{kind:4} {file}" for kind, file in files.items()]
    print_result({"averages": averages.model_dump(mode="json"), "files": files}, as_json, lines)
