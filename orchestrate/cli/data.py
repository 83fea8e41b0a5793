"""The commands `zscl data prepare`, `zscl data fetch` and `zscl data check`."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrate.cli.options import AsJson, exit_with, print_result, progress_console
from orchestrate.cli.terminal import create_stdout_console


def prepare(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Tasks of MTIL, 'mtil' for all eleven, 'embedded', 'folder DIR' (one folder of images per class), "
            "'tinyimagenet DIR', 'imagenet DIR', or 'captions FILE' (texts of a reference set)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tasks; with DIR or FILE, the folder itself.")],
    root: Annotated[
        Path | None, typer.Option(help="A local copy in torchvision's layout. Default: download the data.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks prepared in parallel. Default: one per CPU core.")
    ] = None,
    template: Annotated[
        list[str],
        typer.Option(
            help="With 'folder': a prompt template; repeatable, the first is used for training. "
            "Default: a photo of a {c}."
        ),
    ] = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="With 'folder': seed of the 80/20 split. Default: 42.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="With 'imagenet': file of WordNet ids, one per line. Default: all.")
    ] = None,
    corpus: Annotated[
        bool, typer.Option("--corpus", help="With 'embedded': also the captioned corpus for pre-training.")
    ] = False,
    column: Annotated[
        str | None,
        typer.Option(
            help="With 'captions': name or number (from 1) of the caption column, or key in JSON. Default: detected."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Prepare tasks and reference sets. Existing data is kept.

    Example: zscl data prepare mtil --out data/mtil --root ~/torchvision
    """
    from orchestrate.analysis.prepare_data import prepare_data
    from orchestrate.lifecycle.paths import check_writable

    options = {
        "root": root and root.absolute(),
        "jobs": jobs,
        "template": template or None,
        "seed": seed,
        "classes": classes and classes.absolute(),
        "corpus": corpus or None,
        "column": column,
    }
    used = {name: value for name, value in options.items() if value is not None}
    check_writable(out.absolute())
    content, lines = prepare_data(names, out.absolute(), used, progress_console)
    print_result(content, as_json, lines)


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Tasks of MTIL, 'mtil' for all eleven, or suites that show distribution shift: ImageNet, ImageNetV2, "
            "ImageNet-A, ImageNet-R, ImageNet-Sketch, ObjectNet."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tasks.")],
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of tasks downloaded in parallel. Default: one per CPU core.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download CLIP_benchmark's copies of tasks. Some copies have other splits than the published results.

    Example: zscl data fetch Aircraft Food --out data/copies
    """
    from orchestrate.analysis.prepare_data import fetch_tasks
    from orchestrate.lifecycle.paths import check_writable

    check_writable(out.absolute())
    content, lines = fetch_tasks(names, out.absolute(), jobs, progress_console)
    print_result(content, as_json, lines)


def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A task's folder, in CLIP_benchmark's layout.")],
    picture: Annotated[
        Path | None, typer.Option(help="Write a contact sheet (PNG) with a few images of each class.")
    ] = None,
    per_class: Annotated[int, typer.Option(min=1, max=20, help="Images of each class on the contact sheet.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Check every sample of a task before training on it. The exit code is 1 if the data has problems.

    Example: zscl data check runs/demo/data/digits --picture digits.png
    """
    from orchestrate.analysis.validate_data import check_task, print_report
    from orchestrate.lifecycle.paths import check_writable

    if picture is not None:
        check_writable(picture.absolute().parent, "choose another file with --picture")
    report = check_task(folder, picture, per_class, progress_console)
    if not as_json:
        print_report(report, create_stdout_console())
    print_result(report.model_dump(mode="json"), as_json, [f"picture {picture}"] if picture else [])
    exit_with(1 if report.problems else 0)
