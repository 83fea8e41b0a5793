"""Verbs that make and look at data: `zscl data …`."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrate.cli.options import AsJson, print_result, progress_console
from orchestrate.cli.terminal import stdout_console


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
    column: Annotated[
        str | None,
        typer.Option(
            help="With 'captions': name or number (from 1) of the caption column, or key in JSON. Default: detected."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make tasks and reference sets; what is there already is kept.

    Example: zscl data prepare mtil --out data/mtil --root ~/torchvision
    """
    from orchestrate.analysis import prepare_data as making
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
    given = {name: value for name, value in options.items() if value is not None}
    check_writable(out.absolute())
    content, lines = making.prepare_data(names, out.absolute(), given, progress_console)
    print_result(content, as_json, lines)


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
    from orchestrate.analysis import prepare_data as making
    from orchestrate.lifecycle.paths import check_writable

    check_writable(out.absolute())
    content, lines = making.fetch_tasks(names, out.absolute(), jobs, progress_console)
    print_result(content, as_json, lines)


def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A task's folder, in CLIP_benchmark's layout.")],
    picture: Annotated[Path | None, typer.Option(help="Write a contact sheet (PNG): a few images a class.")] = None,
    per_class: Annotated[int, typer.Option(min=1, max=20, help="Images a class in the picture.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Look at every sample of a task before training on it; exit code 1 where something is wrong with the data.

    Example: zscl data check runs/demo/data/digits --picture digits.png
    """
    from orchestrate.analysis import validate_data as checking
    from orchestrate.lifecycle.paths import check_writable

    if picture is not None:
        check_writable(picture.absolute().parent, "choose another file with --picture")
    finding = checking.check_task(folder, picture, per_class, progress_console)
    if not as_json:
        checking.print_inspection(finding, stdout_console())
    print_result(finding.model_dump(mode="json"), as_json, [f"picture {picture}"] if picture else [])
    if finding.problems:
        raise typer.Exit(1)
