"""`zscl --version` and shell completion."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from support.command import Command

from orchestrate.runs import versions

Zscl = Callable[..., Command]
ROOT = Path(__file__).parents[3]


def test_versions_for_a_bug_report(zscl: Zscl, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = zscl("--version")
    assert shown.code == 0, shown.error
    lines = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    libraries = ("torch", "open_clip_torch", "ray", "mlflow", "webdataset", "pydantic")
    assert list(lines) == ["zscl", "python", *libraries, "CUDA", "platform"]
    assert lines["python"] == platform.python_version()
    assert {library: lines[library] for library in libraries} == {library: version(library) for library in libraries}

    # With a GPU, and without a library, or with a torch that is broken.
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    monkeypatch.setattr(versions, "LIBRARIES", ("torch", "no-such-library"))
    found = versions.collect_versions()
    assert (found["CUDA"], found["no-such-library"]) == ("12.8, GPU 0, GPU 1", "not installed")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert versions.collect_versions()["CUDA"].startswith("torch cannot be imported")


def test_printing_versions_imports_only_torch() -> None:
    code = (
        "import sys; from orchestrate.runs.versions import collect_versions; collect_versions(); "
        "packages = {'torch', 'open_clip', 'ray', 'mlflow', 'webdataset', 'pydantic'}; "
        "print(*{name.partition('.')[0] for name in sys.modules} & packages)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "torch\n"


def test_shell_completion() -> None:
    script = Path(sys.executable).parent / "zscl"  # by its own name, which completion goes by

    def said(*arguments: str, **environment: str) -> str:
        command, variables = [script, *arguments], os.environ | environment
        return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout

    # The shell is named, for there may be none above a test.
    shown = said("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_ZSCL_COMPLETE=complete_bash" in shown
    # What this asks when somebody presses the tabulator.
    for typed, completed in (("zscl ex", "export"), ("zscl --vers", "--version")):
        asked = {"_ZSCL_COMPLETE": "complete_bash", "COMP_CWORD": "1", "COMP_WORDS": typed}
        assert said(**asked).split() == [completed]
