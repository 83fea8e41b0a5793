"""Terminals and locales: any character can be printed, and names are shown unchanged."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from support.command import Command
from support.data import coloured_images

from orchestrate.cli import terminal
from orchestrate.runs.progress import ProgressBar
from zscl.datasets.task_writer import write_task

Zscl = Callable[..., Command]
NAMES = ["[red]", "[/]", ":cat: grün", "日本 → x"]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task whose class names look like markup, or are no ASCII."""
    splits = {"train": coloured_images(8, 0), "test": coloured_images(8, 1)}
    write_task(tmp_path / "task", NAMES, ["a {c}"], splits, suffix="png", source="")
    return tmp_path / "task"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_in_any_encoding(monkeypatch: pytest.MonkeyPatch, task: Path, encoding: str) -> None:
    written, errors = io.BytesIO(), io.BytesIO()
    # capsys has replaced both streams; these are what a terminal of that encoding has.
    for name, stream in (("stdout", written), ("stderr", errors)):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, write_through=True))
    from orchestrate.cli.main import main

    monkeypatch.setattr(sys, "argv", ["zscl", "data", "check", str(task)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    shown = written.getvalue().decode(encoding)
    assert "[red]" in shown
    assert "[/]" in shown
    assert ":cat:" in shown
    assert ("grün" if encoding != "ascii" else "gr\\xfcn") in shown
    assert errors.getvalue() == b""


def test_python_restarts_in_utf_8_mode_in_other_locales(tmp_path: Path) -> None:
    # On its own: a locale is a process's. Neither Python's coercion nor its own UTF-8 mode helps here.
    (tmp_path / "tüb").mkdir()
    code = (
        "import sys; from orchestrate.cli.terminal import use_utf8_mode; use_utf8_mode(); from pathlib import Path; "
        "print(sys.flags.utf8_mode, Path(sys.argv[1]).is_dir(), sys.stdout.encoding, ascii(sys.argv[1][-3:]))"
    )
    environment = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "tüb"], capture_output=True, text=True, env=kept | environment
    )
    assert (found.stdout.split(), found.stderr) == (["1", "True", "ascii", "'t\\xfcb'"], "")


def test_a_name_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch, zscl: Zscl, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    for arguments in (("data", "check", odd), ("run", "recipe.yaml", "--out", odd)):
        found = zscl(*arguments)
        assert found.code == 2
        assert "caf\\xe9, expected UTF-8; rename it with mv" in found.error
    monkeypatch.chdir(odd)
    assert zscl("run", "recipe.yaml").error.startswith("error: the current folder: found ")
    assert zscl("--help").code == 0


def test_a_deleted_current_folder(monkeypatch: pytest.MonkeyPatch, zscl: Zscl, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    found = zscl("run", "recipe.yaml")
    assert (found.code, found.error) == (
        2,
        "error: the current folder was deleted; change to another folder with cd\n",
    )
    monkeypatch.undo()


@pytest.mark.parametrize("name", NAMES)
def test_progress_shows_names_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where the bar has a text column
    monkeypatch.setenv("TERM", "xterm")
    console = terminal.create_stderr_console()
    with ProgressBar(console, total=5) as bar:
        bar.update(f"stage 1/1 {name}", 1)
        bar.update_secondary(f"aside {name}", 1, 2)
        bar.print(f"said {name}")
    console.rule(name)
    shown = capsys.readouterr().err
    assert f"stage 1/1 {name}" in shown
    assert f"said {name}" in shown


def test_a_dumb_terminal_gets_lines_instead_of_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressBar(terminal.create_stderr_console(), total=5) as bar:
        bar.log("stage 1/2 first: 5 steps")
    assert capsys.readouterr().err == "stage 1/2 first: 5 steps\n"


def test_tables_are_not_cut_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table = Table()
    for column in ("method", "Transfer", "Avg", "Last", "forgetting", "time"):
        table.add_column(column)
    table.add_row("zscl[red]", *["100.0"] * 5)
    terminal.create_stdout_console().print(table)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "zscl[red]" in shown
