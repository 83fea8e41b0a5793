"""Output folders that cannot be written, and paths with environment variables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.command import Command
from support.errors import refused

from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.paths import check_writable, restore_password
from orchestrate.recipes.recipe import write_experiment
from schemas.errors import ErrorCode
from schemas.experiment import Experiment

Zscl = Callable[..., Command]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("verb", ["run", "search", "embed", "evaluate", "compare", "export", "pretrain", "demo"])
def test_every_command_refuses_an_output_folder_that_cannot_be_written(
    verb: str, workdir: Path, zscl: Zscl, recipe: Callable[..., dict[str, Any]], tasks: list[str], reference: str
) -> None:
    (workdir / "file").write_text("")
    YAML(typ="safe").dump(recipe(), workdir / "recipe.yaml")
    search = {"domains": {"seed": {"choice": [0, 1]}}, "sampler": "grid", "objectives": ["avg"]}
    YAML(typ="safe").dump({**recipe(), "search": search}, workdir / "search.yaml")
    corpus = {"tasks": tasks, "corpus": reference}
    YAML(typ="safe").dump(corpus, workdir / "pretrain.yaml")
    pretraining = Path(__file__).parents[3] / "experiments/pretrain-embedded.yaml"
    arguments: dict[str, tuple[object, ...]] = {
        "run": ("recipe.yaml", "--offline"),
        "search": ("search.yaml", "--offline"),
        "embed": ("recipe.yaml",),
        "evaluate": ("embedded", "--task", tasks[0]),
        "compare": ("nothing",),
        "export": ("nothing",),
        "pretrain": (pretraining,),
        "demo": (),
    }
    result = zscl(verb, *arguments[verb], "--out", "file/out/mine")
    assert (result.code, result.out) == (2, "")
    assert result.error.startswith(f"error: {workdir}/file/out")
    assert f"cannot be written ({workdir}/file: is not a folder), expected a folder that this user may" in result.error
    assert "Traceback" not in result.error


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare", "embedded", "--out", "file/out"),
        ("fetch", "Food", "--out", "file/out"),
        ("check", "task", "--picture", "file/picture.png"),
    ],
)
def test_data_commands_refuse_an_output_that_cannot_be_written(
    arguments: tuple[str, ...], workdir: Path, zscl: Zscl
) -> None:
    (workdir / "file").write_text("")
    result = zscl("data", *arguments)
    assert result.code == 2
    assert "cannot be written (" in result.error
    assert "is not a folder), expected a folder that this user may write; choose another" in result.error


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("/proc/run", "/proc: No such file or directory"),
        ("link", "is not a folder"),
        ("n" * 250, "a name of 250 bytes; the limit is 200 bytes"),
        ("deep/" * 900, "File name too long"),
    ],
)
def test_folders_that_cannot_be_written(folder: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with refused(ErrorCode.NOT_WRITABLE) as error:
        check_writable(tmp_path / folder)
    assert reason in str(error.value)
    with refused(ErrorCode.NOT_WRITABLE), run_lock(tmp_path / folder):
        pytest.fail("the lock was acquired")


def test_the_check_creates_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "new [folder] (ü)/x")
    assert list(tmp_path.iterdir()) == []


def test_every_command_refuses_long_names(workdir: Path, zscl: Zscl) -> None:
    for arguments in (("sync",), ("compare",), ("resume",), ("data", "check"), ("run",)):
        result = zscl(*arguments, "x" * 300)
        assert result.code == 2, result.error
        assert "Traceback" not in result.error
        assert result.error.startswith("error: ")


def test_variables_and_the_home_folder_are_expanded_in_options(
    workdir: Path, zscl: Zscl, monkeypatch: pytest.MonkeyPatch, tasks: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(workdir))
    monkeypatch.setenv("WHERE", "made")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert zscl("data", "check", tasks[0], "--picture", "~/$WHERE/${WHERE}.png").code == 0
    assert (workdir / "made/made.png").is_file()
    result = zscl("data", "check", tasks[0], "--picture", "$NOWHERE/a.png")
    assert (result.code, result.error) == (
        2,
        "error: picture: found '$NOWHERE/a.png', but the environment variable NOWHERE is not set; set it, or write "
        "the path without it\n",
    )


def test_a_password_of_the_tracking_uri_is_not_written(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "experiment.yaml"
    write_experiment(experiment(tracking={"uri": "http://me:secret@somewhere:5000"}), file)
    assert "http://me:***@somewhere:5000" in file.read_text()
    assert "secret" not in file.read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert restore_password("http://me:***@somewhere:5000") == "http://somewhere:5000"
