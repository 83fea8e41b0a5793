"""The command line: one verb each. Nothing heavy is imported before a verb is known."""

import json
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from schemas.base import InputError, InterruptedRunError
from schemas.secrets import mask

if TYPE_CHECKING:
    from orchestrate.search_preflight import Prepared
    from schemas.experiment import Experiment
    from schemas.results import Result

app = typer.Typer(
    help="Continual fine-tuning of CLIP that keeps its zero-shot ability, on Ray, recorded in MLflow.\n\n"
    "Example: zscl run experiments/embedded.yaml --set method=finetune",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
data = typer.Typer(help="Make and look at data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

MUCH = 10.0  # megabytes to upload with a job: recipes take up less

progress_console = Console(stderr=True)

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="a.b.c=value", help="Override a field of the recipe; repeatable.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The run's folder; with --variant all, the folder of theirs. Default: runs/NAME-METHOD-FINGERPRINT."
    ),
]
Variant = Annotated[str | None, typer.Option(help="Which row of a recipe that is a table of variants, or 'all'.")]
Offline = Annotated[bool, typer.Option("--offline", help="Without MLflow: `zscl sync` sends everything later.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def main() -> None:
    """Run the command line; what the user got wrong is a sentence and exit code 2, not a traceback."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InterruptedRunError as interrupt:
        print(f"interrupted: {interrupt}", file=sys.stderr)
        sys.exit(interrupt.exit_code)
    except Exception:  # a fault of ours: its traceback may be sent to us, so no secret may be in it
        print(mask(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


def emit(content: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """End a command: what it made and where, for people or for programs."""
    if as_json:
        print(json.dumps(content, indent=1))
    elif lines:
        print("\n".join(lines))


def _note(text: str) -> None:
    """Say something beside the results."""
    progress_console.print(text, highlight=False, soft_wrap=True)


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default and nobody writes to it
    out: Out = None,
    variant: Variant = None,
    seeds: Annotated[int, typer.Option(min=1, help="Run with so many seeds, from the recipe's own on.")] = 1,
    orders: Annotated[
        str, typer.Option(help="Run in these task orders: given, reversed, I, II (MTIL's), random:N; by commas.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")] = False,
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
    from orchestrate import recipes
    from orchestrate import run as running

    if probe and not dry_run:
        raise InputError("--probe: found it without --dry-run, expected both: a run says itself how long it takes")

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for opened, folder in running.prepare_variants(recipe, overrides, variant, out, seeds, orders):
        if dry_run:
            plan = running.plan(opened, folder, progress_console)
            if probe:
                from orchestrate import probe as probing

                plan["estimate"] = probing.probe(opened, folder, progress_console)
            contents.append({"experiment": recipes.shown(opened.experiment), "plan": plan})
            continue
        content, said = _ended(
            opened.experiment, folder, running.run(opened, folder, progress_console, offline), offline
        )
        contents.append(content)
        lines += said
    content = contents[0] if len(contents) == 1 else {"variants": contents}
    if dry_run:
        lines = [recipes.dump(content)]
    elif len(contents) > 1:
        from orchestrate import compare as comparing

        folders = {each["folder"]: Path(each["folder"]) for each in contents}
        place = Path(contents[0]["folder"]).parent / "comparison"
        note = None if offline else _note
        compared, written = comparing.compare(folders, place, None if as_json else Console(), note=note)
        content["comparison"] = compared
        lines += written
    emit(content, as_json, lines)


@app.command()
def search(
    recipe: Annotated[Path, typer.Argument(help="Recipe of a search (YAML).")],
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The search's folder. Default: runs/NAME-FINGERPRINT.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Search a recipe's values: many sequences, judged on held-out training images, the chosen one on test, once.

    Example: zscl search experiments/search-embedded.yaml --set search.trials=4 --set optimisation.steps=30
    """
    from orchestrate import recipes, search_preflight

    prepared = search_preflight.prepare(recipe, overrides)
    folder = search_preflight.folder_of(prepared, out)
    if dry_run:
        content: dict[str, Any] = {"plan": search_preflight.plan(prepared, folder)}
        emit(content, as_json, [recipes.dump(content)])
        return
    _searched(prepared, folder, offline, as_json)


def _searched(prepared: "Prepared", folder: Path, offline: bool, as_json: bool) -> None:
    """Run a search, or go on with it, and show what it found."""
    from orchestrate import places
    from orchestrate import search as searching

    found = searching.search(prepared, folder, progress_console, offline)
    if not as_json:
        from orchestrate.search_report import terminal_tables

        Console().print(terminal_tables(found))
    uri = None if offline else places.store_uri(prepared.base.experiment, folder)
    lines = [
        f"search  {folder}",
        f"MLflow  {places.browse_command(uri) if uri else f'zscl sync {folder}'}",
        f"run the chosen recipe on all training images: zscl run {folder / places.CHOSEN}",
    ]
    shown = {"folder": str(folder), "tracking_uri": uri and mask(uri)}
    emit({**shown, "search": found.model_dump(mode="json")}, as_json, lines)


@app.command()
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
    from orchestrate import places, preflight
    from orchestrate import run as running

    folder = folder.absolute()
    if (folder / places.SEARCH).is_file():
        from orchestrate import search_preflight

        _searched(search_preflight.resumable(folder, overrides), folder, offline, as_json)
        return
    opened = preflight.prepare(running.resumable(folder, overrides))
    content, lines = _ended(opened.experiment, folder, running.run(opened, folder, progress_console, offline), offline)
    emit(content, as_json, lines)


def _ended(experiment: "Experiment", folder: Path, result: "Result", offline: bool) -> tuple[dict[str, Any], list[str]]:
    """What a finished run has made and where, for programs and for people."""
    from orchestrate import places, report

    uri = None if offline else places.store_uri(experiment, folder)
    shown = {"folder": str(folder), "tracking_uri": uri and mask(uri)}
    figures = "  ".join(f"{name} {report.percent(value)}" for name, value in result.metrics.model_dump().items())
    lines = [
        *(f"warning: {sentence}" for sentence in result.warnings),
        f"{figures}  (zero-shot transfer {report.percent(result.zero_shot_metrics.transfer)})",
        f"time    {report.where_time_went(result, beside=experiment.compute.evaluation == 'overlapped')}",
        f"run     {folder}",
        f"models  {folder}/stages/<k>-<task>/model  (open_clip: local-dir:…)",
        f"MLflow  {places.browse_command(uri) if uri else f'zscl sync {folder}'}",
    ]
    return {**shown, "result": result.model_dump(mode="json")}, lines


@app.command()
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
    from orchestrate import run as running

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for opened, folder in running.prepare_variants(recipe, overrides, variant, out):
        done = running.embed(opened, folder, progress_console)
        contents.append(done.model_dump())
        lines.append(f"{done.images} images, {done.texts} texts; {done.megabytes:.1f} MB of features in {done.folder}")
    emit(contents[0] if len(contents) == 1 else {"variants": contents}, as_json, lines)


@app.command()
def sync(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or searches, on which nobody works.")],
    uri: Annotated[str | None, typer.Option(help="MLflow tracking URI. Default: that of the run's recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send to MLflow what it does not have yet of runs: what was run offline, or while it was away.

    Example: zscl sync runs/demo/finetune runs/demo/zscl
    """
    from orchestrate import places, search_tracking, shipping
    from orchestrate.display import Bar

    contents: list[dict[str, Any]] = []
    lines: list[str] = []
    for run in runs:
        with Bar(progress_console) as bar:
            if (run / places.SEARCH).is_file():
                synced = search_tracking.sync_search(
                    run.absolute(), uri, lambda name, *how_far, bar=bar: bar.update(f"sending {name}", *how_far)
                )
            else:
                synced = shipping.sync(run, uri, partial(bar.update, f"sending {run.name}"))
        contents.append(synced.model_dump())
        lines.append(f"{run}: {synced.entries} entries sent to {synced.tracking_uri}, {synced.status}")
    emit(contents[0] if len(contents) == 1 else {"runs": contents}, as_json, lines)


@app.command()
def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Folders of runs, or their ids in MLflow.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: comparison/ beside the first run.")] = None,
    where: Annotated[
        str | None, typer.Option(help="Also the runs in MLflow that this search expression finds.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or runs/mlflow.db.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Method that the others' differences are from. Default: the first.")
    ] = None,
    published: Annotated[str | None, typer.Option(help="Beside the paper's figures for MTIL, order I or II.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not leave the page with the runs in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare what runs forget, by method, over seeds and orders: tables, LaTeX, and one page to look at.

    Example: zscl compare runs/demo/finetune runs/demo/zscl
    """
    from orchestrate import compare as comparing
    from orchestrate import finding

    found = finding.find(runs or [], where, uri)
    first = next((place for place in found.values() if isinstance(place, Path)), Path.cwd() / "runs/run")
    folder = out or first.parent / "comparison"
    console, note = None if as_json else Console(), None if offline else _note
    content, lines = comparing.compare(found, folder.absolute(), console, published, baseline, note)
    emit(content, as_json, lines)


@app.command()
def submit(
    recipe: Recipe,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        str | None, typer.Option(help="The run's folder, as the cluster sees it: one that all its nodes share.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of the cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265."),
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
    from orchestrate import recipes
    from orchestrate import submit as submitting

    place = working_dir.resolve()
    command = submitting.entrypoint(recipe, overrides, out, place)
    size = submitting.megabytes_uploaded(place)
    _note(f"uploads {size:.1f} MB" + (": .rayignore may name what the run does not need" if size > MUCH else ""))
    grace = max(each.compute.grace_seconds for each in recipes.load_variants(recipe, overrides).values())
    job, follow = submitting.submit(command, place, address, grace)
    _note(f"job {job.id}: {mask(command)}\nstop it: ray job stop --address {job.address} {job.id}")
    emit({"job": job.id, "address": job.address}, as_json, [] if wait else [job.id])
    if wait and (code := follow(sys.stderr if as_json else sys.stdout)):
        raise typer.Exit(code)


@app.command()
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
    from orchestrate import evaluate as judging

    options = judging.options(protocol, templates, precision, batch_size, loader_processes)
    subject = judging.subject(what, pretrained, stage, task, suite)
    found = judging.evaluate(subject, options, progress_console)
    folder = (out or (subject.run / "evaluation" if subject.run else Path("runs/evaluation"))).absolute()
    written = judging.write_evaluation(found, folder)
    if not as_json:
        Console(markup=False).print(judging.terminal_tables(found))
    if subject.run is not None and not offline:
        judging.record(found, subject, options, list(written.values()), _note)
    lines = [f"{kind:11} {file}" for kind, file in written.items()]
    emit({"evaluation": found.model_dump(mode="json"), "files": written}, as_json, lines)


@app.command()
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
    from orchestrate import averages

    wanted = averages.wanted(every, kind, decay, share, anchor)
    found_stage = averages.Stage.of(run.absolute(), stage)
    found_stage.check(wanted)
    found = averages.explore(found_stage, wanted, progress_console)
    place = f"averages/{found.stage}-{found.task}"
    written = averages.write_averages(found, (out or run / place).absolute())
    if not as_json:
        Console(markup=False).print(averages.terminal_table(found))
    emit(
        {"averages": found.model_dump(mode="json"), "files": written},
        as_json,
        [f"{kind:4} {file}" for kind, file in written.items()],
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder of the model; it must not be there yet.")],
    stage: Annotated[int | None, typer.Option(help="Which stage's model, from 1. Default: the last.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a stage's model a folder for the Hugging Face hub: open_clip's layout, and a card made from the run.

    Example: zscl export runs/demo/zscl --stage 6 --out runs/demo-zscl-model
    """
    from orchestrate import export as exporting

    folder = exporting.export(run.absolute(), stage, out.absolute())
    lines = [f"model   {folder}  (open_clip: local-dir:{folder})", f"upload  hf upload OWNER/NAME {folder}"]
    emit({"folder": str(folder)}, as_json, lines)


@app.command()
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


@app.command()
def pretrain(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="Folder of the model.")],
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Train a small CLIP from nothing, contrastively, and write it as an open_clip folder.

    Example: zscl pretrain experiments/pretrain-embedded.yaml --out runs/embedded-model
    """
    from orchestrate import recipes
    from orchestrate.display import Bar
    from schemas.pretraining import Pretraining

    checked = recipes.parse(Pretraining, {"name": recipe.stem, **recipes.read(recipe, overrides)}, recipe)
    import torch

    from zscl.pretraining import pretrain as train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Bar(progress_console) as bar:
        made = train(
            checked,
            out.absolute(),
            lambda step, steps, loss: bar.update("pre-training", step, steps, f"loss {loss:.3f}"),
            device,
        )
    lines = [f"zero-shot {task} {100 * value:.1f}" for task, value in made.zero_shot.items()]
    lines.append(f"model   {made.folder}  (open_clip: local-dir:{made.folder})")
    emit(
        {"folder": str(made.folder), "steps": made.steps, "loss": made.loss, "zero_shot": made.zero_shot},
        as_json,
        lines,
    )


@data.command()
def prepare(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Tasks of MTIL, 'mtil' for all eleven, 'embedded', 'folder DIR' (a folder of images a class), "
            "'tinyimagenet DIR', 'imagenet DIR', or 'captions FILE' (texts of a reference set)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the tasks; with a DIR, of the one task.")],
    root: Annotated[
        Path | None, typer.Option(help="A local copy in torchvision's layout. Default: it is downloaded.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Tasks at once. Default: one a CPU core.")] = None,
    template: Annotated[
        list[str],
        typer.Option(help="With 'folder': a prompt template; repeatable, the first trains. Default: a photo of a {c}."),
    ] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="With 'folder': of the 80/20 split. Default: 42.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="With 'imagenet': file of WordNet ids, one a line. Default: all.")
    ] = None,
    corpus: Annotated[
        bool, typer.Option("--corpus", help="With 'embedded': also the captioned corpus for pre-training.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make tasks and reference sets; what is there already is kept.

    Example: zscl data prepare mtil --out data/mtil --root ~/torchvision
    """
    from orchestrate import data as making

    options = {
        "root": root and root.expanduser().absolute(),
        "jobs": jobs,
        "template": template or None,
        "seed": seed,
        "classes": classes and classes.expanduser().absolute(),
        "corpus": corpus or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    content, lines = making.prepare(names, out.expanduser().absolute(), given, progress_console)
    emit(content, as_json, lines)


@data.command()
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Tasks of MTIL, 'mtil' for all eleven, or suites that show drift: ImageNet, ImageNetV2, ImageNet-A, "
            "ImageNet-R, ImageNet-Sketch, ObjectNet."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the tasks.")],
    jobs: Annotated[int | None, typer.Option(min=1, help="Tasks at once. Default: one a CPU core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download CLIP_benchmark's copies of tasks; not all of them have the split of the published numbers.

    Example: zscl data fetch Aircraft Food --out data/copies
    """
    from orchestrate import data as making

    content, lines = making.fetch(names, out.expanduser().absolute(), jobs, progress_console)
    emit(content, as_json, lines)


@data.command()
def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A task's folder, in CLIP_benchmark's layout.")],
    picture: Annotated[Path | None, typer.Option(help="Write a contact sheet (PNG): a few images a class.")] = None,
    per_class: Annotated[int, typer.Option(min=1, max=20, help="Images a class in the picture.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Look at every sample of a task before training on it; exit code 1 where something is wrong with the data.

    Example: zscl data check runs/demo/data/digits --picture digits.png
    """
    from orchestrate import check as checking

    finding = checking.check(folder, picture, per_class, progress_console)
    if not as_json:
        # Class names and keys are the user's: no markup in them is meant.
        checking.show(finding, Console(markup=False, emoji=False, highlight=False))
    emit(finding.model_dump(mode="json"), as_json, [f"picture {picture}"] if picture else [])
    if finding.problems:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's data and runs.")] = Path("runs/demo"),
    recipe: Annotated[Path, typer.Option(help="Recipe of the embedded suite.")] = Path("experiments/embedded.yaml"),
    overrides: Overrides = [],  # noqa: B006
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Watch a CLIP forget, and not forget: fine-tuning against ZSCL, offline, in a few minutes.

    Example: zscl demo --out runs/demo
    """
    from orchestrate import compare as comparing
    from orchestrate import demo as demonstration
    from orchestrate import places

    runs, uri = demonstration.demo(recipe, out.absolute(), overrides, progress_console, offline)
    progress_console.rule("comparison")
    found_runs = {str(run): run for run in runs}
    console, note = None if as_json else Console(), None if offline else _note
    content, lines = comparing.compare(found_runs, out.absolute() / "comparison", console, note=note)
    browse = f"zscl sync {' '.join(map(str, runs))}" if offline else places.browse_command(uri)
    lines.append(f"MLflow    {browse}")
    shown = None if offline else mask(uri)
    found = {"runs": [str(run) for run in runs], "tracking_uri": shown, **content}
    emit(found, as_json, lines)
