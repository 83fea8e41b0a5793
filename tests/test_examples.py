"""Tests that run the examples with a few steps each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEW = ("--set", "optimisation.steps=4", "--set", "method.average=null", "--set", "compute.device=cpu")


def run(*command: object, folder: Path) -> str:
    """Run a command of an example in a user's folder, and return its standard output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.slow  # test_documents.py runs the same steps in one process
def test_own_folders(folder: Path) -> None:
    run(ROOT / "examples/own-folders/run.sh", *FEW, folder=folder)
    work = folder / "runs/examples/own-folders"
    assert (work / "comparison/comparison.html").is_file()
    assert (work / "digits.png").is_file()
    said = run(sys.executable, ROOT / "examples/reading-results/read.py", work, folder=folder)
    for part in ("finetune: accuracy", "zscl: mean losses", "in MLflow", "image_distillation"):
        assert part in said
    table = said.partition("in MLflow\n")[2].splitlines()
    assert table[0].split() == ["method.name", "seed", "transfer", "avg", "last", "forgetting"]
    assert sorted(line.split()[0] for line in table[1:]) == ["finetune", "zscl"]


@pytest.mark.slow  # the loss itself: tests/zscl/methods/test_custom_losses.py
def test_a_loss_of_ones_own(folder: Path) -> None:
    said = run(ROOT / "examples/custom-loss/run.sh", *FEW, folder=folder)
    header, *rows = said.splitlines()[-3:]
    assert header.split(",")[2:] == [
        "classification", "image_distillation", "consolidation", "relations", "gradient_norm",
    ]  # fmt: skip
    assert len(rows) == 2
