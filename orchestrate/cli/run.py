"""Verbs that run recipes, here or as a job of a cluster, that search, and that say what a recipe may hold."""

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
    compare_and_print,
    print_result,
    print_note,
    single_or_list,
    progress_console,
)
from orchestrate.cli.search import run_and_report
from schemas.errors import InputError, command
from schemas.redaction import mask

if TYPE_CHECKING:
    from schemas.experiment import Experiment
    from schemas.results import Result

MUCH = 10.0  # megabytes to upload with a job: recipes take up less


def run(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default and nobody writes to it
    out: Out = None,
    variant: Variant = None,
    seeds: Annotated[int, typer.Option(min=1, help="Run with so many seeds, from the recipe's own on.")] = 1,
    orders: Annotated[
        str, typer.Option(help="Run in these task orders: given, reversed, I, II (MTIL's), random:N; by commas.")
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check recipe, data, model, shards, folders, disk, cluster, tracking; say what would be done.",
        ),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: train for a minute there, say how long all of it takes."),
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe; one that was interrupted goes on from its last checkpoint. Several runs are compared at the end.

    Example: zscl run experiments/embedded.yaml --set method=finetune --set seed=1
    """
    from orchestrate.recipes import recipe as recipes
    from orchestrate.recipes.yaml_loader import dump_yaml
    from orchestrate.runs import run as running

    if probe and not dry_run:
        raise InputError("--probe: found it without --dry-run, expected both: a run says itself how long it takes")

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for opened, folder in running.prepare_variants(recipe, overrides, variant, out, seeds, orders):
        if variant == recipes.ALL or seeds > 1 or orders:
            print_note(f"run {len(contents) + 1}: {folder}")
        if dry_run:
            plan = running.plan_run(opened, folder, progress_console, offline)
            if probe:
                from orchestrate.runs import estimate as probing

                plan["estimate"] = probing.estimate_run(opened, folder, progress_console)
            contents.append({"experiment": recipes.as_recipe(opened.experiment), "plan": plan})
            continue
        content, said = summarize_run(
            opened.experiment, folder, running.run_experiment(opened, folder, progress_console, offline), offline
        )
        contents.append(content)
        lines += said
    content = single_or_list(contents, "variants")
    if dry_run:
        lines = [dump_yaml(content)]
    elif len(contents) > 1:
        folders = {each["folder"]: Path(each["folder"]) for each in contents}
        place = Path(contents[0]["folder"]).parent / "comparison"
        content["comparison"], written = compare_and_print(folders, place, as_json, offline)
        lines += written
    print_result(content, as_json, lines)


def summarize_run(experiment: "Experiment", folder: Path, result: "Result", offline: bool) -> tuple[dict[str, Any], list[str]]:
    """What a finished run has made and where, for programs and for people."""
    from orchestrate.lifecycle.paths import browse_command, store_uri
    from orchestrate.reports.results import format_percent, where_time_went

    uri = None if offline else store_uri(experiment, folder)
    shown = {"folder": str(folder), "tracking_uri": uri and mask(uri)}
    figures = "  ".join(
        f"{name.replace('_', ' ')} {format_percent(value)}" for name, value in result.metrics.model_dump().items()
    )
    lines = [
        *([f"warnings {len(result.warnings)}, said above and in {folder}/result.json"] if result.warnings else []),
        f"{figures}  (zero-shot transfer {format_percent(result.zero_shot_metrics.transfer)})",
        f"time    {where_time_went(result, beside=experiment.compute.evaluation == 'overlapped')}",
        f"run     {folder}",
        f"models  {folder}/stages/<k>-<task>/model  (open_clip: local-dir:…)",
        f"MLflow  {browse_command(uri) if uri else command('zscl', 'sync', folder)}",
    ]
    return {**shown, "result": result.model_dump(mode="json")}, lines


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, or a search's.")],
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="a.b.c=value", help="Change a field of compute or tracking; repeatable."),
    ] = [],  # noqa: B006
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a run or a search that was interrupted, from its last checkpoint, to the same numbers.

    Example: zscl resume runs/embedded-zscl-1a2b3c4d --set compute.workers=1
    """
    from orchestrate.lifecycle.paths import SEARCH
    from orchestrate.runs import preflight
    from orchestrate.runs import run as running

    folder = folder.absolute()
    if (folder / SEARCH).is_file():
        from orchestrate.search.preflight import load_resumable_search

        run_and_report(load_resumable_search(folder, overrides), folder, offline, as_json)
        return
    opened = preflight.prepare(running.load_resumable_run(folder, overrides))
    content, lines = summarize_run(
        opened.experiment, folder, running.run_experiment(opened, folder, progress_console, offline), offline
    )
    print_result(content, as_json, lines)


def embed(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Let the teacher embed the reference set ahead of training, on all workers; runs beside each other share it.

    Example: zscl embed experiments/embedded.yaml --set compute.workers=2
    """
    from orchestrate.runs import run as running

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for opened, folder in running.prepare_variants(recipe, overrides, variant, out):
        done = running.run_embedding(opened, folder, progress_console)
        contents.append(done.model_dump())
        lines.append(f"{done.images} images, {done.texts} texts; {done.megabytes:.1f} MB of features in {done.folder}")
    print_result(single_or_list(contents, "variants"), as_json, lines)


def submit(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        str | None, typer.Option(help="The run's folder, as the cluster sees it: one that all its nodes share.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the cluster's dashboard, or any that `ray job submit` takes. As there, RAY_API_SERVER_ADDRESS and "
            "RAY_ADDRESS come before it. Default: http://127.0.0.1:8265."
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Uploaded, but for what .gitignore and .rayignore name; holds the recipe.")
    ] = Path(),
    wait: Annotated[bool, typer.Option(help="Follow the job's output to its end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Run a recipe as a job of a Ray cluster; submitted again with the same --out, it goes on.

    Example: zscl submit experiments/mtil-order-1.yaml --out /shared/runs/mtil --address http://127.0.0.1:8265
    """
    from orchestrate.cluster import jobs as submitting
    from orchestrate.recipes import recipe as recipes

    place = working_dir.resolve()
    entrypoint = submitting.entrypoint(recipe, overrides, out, place)
    size = submitting.megabytes_uploaded(place)
    print_note(f"uploads {size:.1f} MB" + (": .rayignore may name what the run does not need" if size > MUCH else ""))
    grace = max(each.compute.grace_seconds for each in recipes.load_variants(recipe, overrides).values())
    job, follow = submitting.submit(entrypoint, place, address, grace, print_note)
    stop = command("ray", "job", "stop", "--address", job.address, job.id)
    print_note(f"job {job.id}: {mask(entrypoint)}\nstop it: {stop}")
    print_result({"job": job.id, "address": mask(job.address)}, as_json, [] if wait else [job.id])
    if wait and (code := follow(sys.stderr if as_json else sys.stdout)):
        raise typer.Exit(code)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's data and runs.")] = Path("runs/demo"),
    recipe: Annotated[
        Path, typer.Option(help="Recipe of the embedded suite.", show_default="the one that comes with the package")
    ] = Path(__file__).parent.parent / "embedded.yaml",
    overrides: Overrides = [],  # noqa: B006
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Watch a CLIP forget, and not forget: fine-tuning against ZSCL, offline, in a few minutes.

    Example: zscl demo --out runs/demo
    """
    from orchestrate.lifecycle.paths import browse_command, check_writable
    from orchestrate.runs import demo as demonstration

    check_writable(out.absolute())
    runs, uri = demonstration.run_demo(recipe, out.absolute(), overrides, progress_console, offline)
    progress_console.rule("comparison")
    found_runs = {str(run): run for run in runs}
    content, lines = compare_and_print(found_runs, out.absolute() / "comparison", as_json, offline)
    browse = command("zscl", "sync", *runs) if offline else browse_command(uri)
    lines.append(f"MLflow    {browse}")
    shown = None if offline else mask(uri)
    found = {"runs": [str(run) for run in runs], "tracking_uri": shown, **content}
    print_result(found, as_json, lines)


def schema(
    of_search: Annotated[bool, typer.Option("--search", help="Of a recipe's section `search` instead.")] = False,
    as_json: AsJson = True,
) -> None:
    """Print the recipe's JSON Schema, for editors.

    Example: zscl schema > recipe.schema.json
    """
    from schemas.experiment import Experiment
    from schemas.search import Search

    print(json.dumps((Search if of_search else Experiment).model_json_schema(), indent=1))
