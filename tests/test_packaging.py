"""Test that the wheel contains the three packages and their data files."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_has_all_that_the_packages_read(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", ROOT, "-w", tmp_path],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        recipe = content.read("orchestrate/embedded.yaml").decode()
        [metadata] = [content.read(name).decode() for name in names if name.endswith("METADATA")]
    for package in ("schemas", "zscl", "orchestrate"):
        there = {file.relative_to(ROOT).as_posix() for file in (ROOT / package).rglob("*.py")}
        assert there | {f"{package}/py.typed"} <= names
    for data in ("zscl/models/embedded_model", "orchestrate/templates"):
        assert {file.relative_to(ROOT).as_posix() for file in (ROOT / data).iterdir()} <= names
    assert "zscl/datasets/prompts.json" in names
    assert recipe == (ROOT / "experiments/embedded.yaml").read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^Version: {re.escape(version)}$", metadata, flags=re.M)
