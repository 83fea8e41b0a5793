"""`zscl submit`: what is refused here, and the command that a job runs; `tests/cluster/submit.sh` submits real ones."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from ruamel.yaml import YAML

from orchestrate.submit import entrypoint, megabytes_uploaded
from schemas.base import InputError


@pytest.fixture
def file(tmp_path: Path, recipe: Callable[..., dict[str, Any]]) -> Path:
    (tmp_path / "experiments").mkdir()
    YAML(typ="safe").dump(recipe(), tmp_path / "experiments/my own.yaml")
    return tmp_path / "experiments/my own.yaml"


def test_the_command_is_the_users_own(file: Path, tmp_path: Path) -> None:
    made = entrypoint(file, ["seed=1", "method={preset: zscl, average: null}"], "/shared/runs/mine", tmp_path)
    assert made == (
        "zscl run 'experiments/my own.yaml' --out /shared/runs/mine --set seed=1 "
        "--set 'method={preset: zscl, average: null}'"
    )


def test_what_the_cluster_would_refuse_is_refused_here(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'seed'"):
        entrypoint(file, ["sed=1"], None, tmp_path)
    with pytest.raises(InputError, match=r"my own\.yaml: found it outside of .*/else, expected it in the working"):
        entrypoint(file, [], None, tmp_path / "else")


def test_no_cluster_answers(file: Path, tmp_path: Path, zscl: Callable[..., Command]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    found = zscl("submit", file, "--working-dir", tmp_path, "--address", address)
    assert (found.code, f"--address {address}: found no Ray cluster that takes the job" in found.error) == (2, True)


def test_what_is_uploaded_is_known_beforehand(file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/large").write_bytes(os.urandom(2_000_000))
    assert megabytes_uploaded(tmp_path) > 2
    (tmp_path / ".rayignore").write_text("/runs/\n")
    assert megabytes_uploaded(tmp_path) < 0.01
