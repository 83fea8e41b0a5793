"""Tests that imports go in one direction (schemas ← zscl ← orchestrate), and that `zscl --help` is fast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules(package: str) -> list[str]:
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in (ROOT / package).rglob("[a-z]*.py")]


def loaded_after(statements: str) -> set[str]:
    code = f"{statements}\nimport sys\nprint('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return set(output.split())


@pytest.mark.parametrize(
    ("package", "strangers"),
    [
        ("schemas", {"torch", "numpy", "open_clip", "webdataset", "ray", "mlflow", "zscl", "orchestrate", "ruamel"}),
        # rich is not listed because httpx tries to import it; test_house.py checks direct imports.
        ("zscl", {"ray", "mlflow", "orchestrate", "typer", "ruamel", "sklearn", "matplotlib"}),
    ],
)
def test_a_package_does_not_import(package: str, strangers: set[str]) -> None:
    loaded = loaded_after("\n".join(f"import {module}" for module in modules(package)))
    assert package in loaded
    assert not loaded & strangers


def test_help_is_instant_and_shows_an_example() -> None:
    seconds = []
    for _ in range(3):  # minimum of three CPU times, so that other processes do not influence the result
        before = os.times()
        output = subprocess.run(
            [Path(sys.executable).parent / "zscl", "--help"], capture_output=True, text=True, check=True
        ).stdout
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert "Example: zscl run" in output
    assert min(seconds) < 1.0


def test_parsing_a_recipe_does_not_import_torch() -> None:
    assert not loaded_after("from schemas.experiment import Experiment; Experiment.model_json_schema()") & {"torch"}
