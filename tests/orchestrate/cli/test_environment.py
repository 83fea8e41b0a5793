"""Environment variables that are set before libraries are imported: telemetry and the home directory."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrate

# What the libraries themselves make of the variables.
ASKED = """
import orchestrate.cli.main
from huggingface_hub import constants
from mlflow.telemetry.utils import is_telemetry_disabled
from ray._common.usage.usage_lib import usage_stats_enabled
print(is_telemetry_disabled(), not usage_stats_enabled(), constants.HF_HUB_DISABLE_TELEMETRY)
"""


def test_telemetry_is_disabled() -> None:
    # In CI, MLflow sends nothing whatever it is told.
    left_out = {*orchestrate.NO_TELEMETRY, "CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    ended = subprocess.run(
        [sys.executable, "-c", ASKED], env=environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2_000:]
    assert ended.stdout.split() == ["True"] * 3


def test_variables_that_the_user_has_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in orchestrate.NO_TELEMETRY:
        monkeypatch.setenv(name, "of the user")
    importlib.reload(orchestrate)
    assert {os.environ[name] for name in orchestrate.NO_TELEMETRY} == {"of the user"}


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", dict[int, object]().__getitem__)  # as in a container, under another number
    importlib.reload(orchestrate)
    assert Path.home() == Path("/nonexistent")
