"""The commands that run recipes (`run`, `resume`, `embed`, `submit`, `demo`), and the command `schema`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrate.cli.options import (
    AsJson,
    Offline,
    Out,
    Overrides,
    Recipe,
    Variant,
    combine_results,
    compare_and_print,
    exit_with,
    print_note,
    print_result,
    progress_console,
)
from orchestrate.cli.search import run_and_report
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.redaction import mask

if TYPE_CHECKING:
    from schemas.experiment import Experiment
    from schemas.results import Result

LARGE_UPLOAD_MEGABYTES = 10.0  # a larger working directory probably contains files that the job does not need


def run(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006 - typer needs the default, and nothing changes it
    out: Out = None,
    variant: Variant = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to run, counting from the recipe's seed.")] = 1,
    orders: Annotated[
        str, typer.Option(help="Task orders to run, separated by commas: given, reversed, I, II (MTIL's), random:N.")
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check recipe, data, model, shards, folders, disk, cluster and tracking, and print the plan.",
        ),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: train for a minute, and estimate the duration of the run."),
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe, or resume it from its last checkpoint. Several runs are compared at the end.

    Example: zscl run experiments/embedded.yaml --set method=finetune --set seed=1
    """
    from orchestrate.recipes.recipe import to_recipe
    from orchestrate.recipes.variants import ALL_VARIANTS
    from orchestrate.recipes.yaml_loader import dump_yaml
    from orchestrate.runs.run import plan_run, prepare_variants, run_experiment

    _check_probe(probe, dry_run)
    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for resolved, folder in prepare_variants(recipe, overrides, variant, out, seeds, orders):
        if variant == ALL_VARIANTS or seeds > 1 or orders:
            print_note(f"run {len(contents) + 1}: {folder}")
        if dry_run:
            plan = plan_run(resolved, folder, progress_console, offline)
            if probe:
                from orchestrate.runs.estimate import estimate_run

                plan["estimate"] = estimate_run(resolved, folder, progress_console)
            contents.append({"experiment": to_recipe(resolved.experiment), "plan": plan})
            continue
        result = run_experiment(resolved, folder, progress_console, offline)
        content, run_lines = summarize_run(resolved.experiment, folder, result, offline)
        contents.append(content)
        lines += run_lines
    content = combine_results(contents, "variants")
    if dry_run:
        lines = [dump_yaml(content)]
    elif len(contents) > 1:
        folders = {summary["folder"]: Path(summary["folder"]) for summary in contents}
        comparison = Path(contents[0]["folder"]).parent / "comparison"
        content["comparison"], comparison_lines = compare_and_print(folders, comparison, as_json, offline)
        lines += comparison_lines
    print_result(content, as_json, lines)


def _check_probe(probe: bool, dry_run: bool) -> None:
    if probe and not dry_run:
        raise InputError(
            "--probe needs --dry-run. A real run prints its remaining time",
            code=ErrorCode.CONFLICT,
            field="--probe",
        )


def summarize_run(
    experiment: "Experiment", folder: Path, result: "Result", offline: bool
) -> tuple[dict[str, Any], list[str]]:
    """Summarize a finished run: its metrics, its duration, and the locations of its files.

    Args:
        experiment: The run's experiment.
        folder: The run's folder.
        result: The run's result.
        offline: Whether the run was not recorded in MLflow.

    Returns:
        The summary as a JSON dictionary, and as lines of text for people.
    """
    from orchestrate.lifecycle.paths import browse_command, tracking_uri
    from orchestrate.reports.results import format_percent, format_time_breakdown
    from zscl.sequence.layout import MODEL_FOLDER, RESULT, stages_folder

    uri = None if offline else tracking_uri(experiment, folder)
    figures = "  ".join(
        f"{name.replace('_', ' ')} {format_percent(value)}" for name, value in result.metrics.model_dump().items()
    )
    warnings = [f"warnings {len(result.warnings)}, printed above and in {folder / RESULT}"] if result.warnings else []
    lines = [
        *warnings,
        f"{figures}  (zero-shot transfer {format_percent(result.zero_shot_metrics.transfer)})",
        f"time    {format_time_breakdown(result, overlapped=experiment.compute.evaluation == 'overlapped')}",
        f"run     {folder}",
        f"models  {stages_folder(folder)}/<k>-<task>/{MODEL_FOLDER}  (open_clip: local-dir:…)",
        f"MLflow  {browse_command(uri) if uri else shell_command('zscl', 'sync', folder)}",
    ]
    content = {"folder": str(folder), "tracking_uri": uri and mask(uri), "result": result.model_dump(mode="json")}
    return content, lines


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or a search.")],
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="a.b.c=value", help="Override a field of compute or tracking; repeatable."),
    ] = [],  # noqa: B006
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Resume an interrupted run or search from its last checkpoint. The results equal those of an uninterrupted run.

    Example: zscl resume runs/embedded-zscl-1a2b3c4d --set compute.workers=1
    """
    from orchestrate.lifecycle.paths import SEARCH
    from orchestrate.runs import preflight
    from orchestrate.runs.run import load_resumable_run, run_experiment

    folder = folder.absolute()
    if (folder / SEARCH).is_file():
        from orchestrate.search.preflight import load_resumable_search

        run_and_report(load_resumable_search(folder, overrides), folder, offline, as_json)
        return
    resolved = preflight.prepare(load_resumable_run(folder, overrides))
    result = run_experiment(resolved, folder, progress_console, offline)
    content, lines = summarize_run(resolved.experiment, folder, result, offline)
    print_result(content, as_json, lines)


def embed(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Compute the teacher's features of the reference set. Runs in the same parent folder share them.

    Example: zscl embed experiments/embedded.yaml --set compute.workers=2
    """
    from orchestrate.runs.run import prepare_variants, run_embedding

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for resolved, folder in prepare_variants(recipe, overrides, variant, out):
        report = run_embedding(resolved, folder, progress_console)
        contents.append(report.model_dump())
        lines.append(
            f"{report.images} images, {report.texts} texts; {report.megabytes:.1f} MB of features in {report.folder}"
        )
    print_result(combine_results(contents, "variants"), as_json, lines)


def submit(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        str | None, typer.Option(help="The run's folder on the cluster, in a file system that all nodes share.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the cluster's dashboard, or any that `ray job submit` accepts. "
            "RAY_API_SERVER_ADDRESS and RAY_ADDRESS take precedence. Default: http://127.0.0.1:8265."
        ),
    ] = None,
    working_dir: Annotated[
        Path,
        typer.Option(help="Folder to upload, with the recipe. Files in .gitignore and .rayignore are excluded."),
    ] = Path(),
    wait: Annotated[bool, typer.Option(help="Print the job's output until it ends.")] = True,
    as_json: AsJson = False,
) -> None:
    """Run a recipe as a job on a Ray cluster. Submitting it again with the same --out resumes the run.

    Example: zscl submit experiments/mtil-order-1.yaml --out /shared/runs/mtil --address http://127.0.0.1:8265
    """
    from orchestrate.cluster.jobs import build_entrypoint, measure_upload_megabytes, submit_job
    from orchestrate.recipes.variants import load_variants

    folder = working_dir.resolve()
    entrypoint = build_entrypoint(recipe, overrides, out, folder)
    size = measure_upload_megabytes(folder)
    advice = "; list files that the run does not need in .rayignore" if size > LARGE_UPLOAD_MEGABYTES else ""
    print_note(f"uploads {size:.1f} MB{advice}")
    grace = max(experiment.compute.grace_seconds for experiment in load_variants(recipe, overrides).values())
    job, follow = submit_job(entrypoint, folder, address, grace, print_note)
    stop = shell_command("ray", "job", "stop", "--address", job.address, job.id)
    print_note(f"job {job.id}: {mask(entrypoint)}\nstop it: {stop}")
    print_result({"job": job.id, "address": mask(job.address)}, as_json, [] if wait else [job.id])
    if wait:
        exit_with(follow(sys.stderr if as_json else sys.stdout))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's data and runs.")] = Path("runs/demo"),
    recipe: Annotated[
        Path, typer.Option(help="Recipe of the embedded suite.", show_default="included in the package")
    ] = Path(__file__).parent.parent / "embedded.yaml",
    overrides: Overrides = [],  # noqa: B006
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Compare fine-tuning and ZSCL on a small suite, offline. It takes a few minutes.

    Example: zscl demo --out runs/demo
    """
    from orchestrate.lifecycle.paths import browse_command, check_writable
    from orchestrate.runs.demo import run_demo

    check_writable(out.absolute())
    runs, uri = run_demo(recipe, out.absolute(), overrides, progress_console, offline)
    progress_console.rule("comparison")
    folders = {str(run): run for run in runs}
    content, lines = compare_and_print(folders, out.absolute() / "comparison", as_json, offline)
    browse = shell_command("zscl", "sync", *runs) if offline else browse_command(uri)
    lines.append(f"MLflow    {browse}")
    summary = {"runs": list(folders), "tracking_uri": None if offline else mask(uri), **content}
    print_result(summary, as_json, lines)


def schema(
    of_search: Annotated[
        bool, typer.Option("--search", help="Print the schema of the section `search` instead.")
    ] = False,
    as_json: AsJson = True,
) -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: zscl schema > recipe.schema.json
    """
    from schemas.experiment import Experiment
    from schemas.search import Search

    print(json.dumps((Search if of_search else Experiment).model_json_schema(), indent=1))
