"""Tests that the benchmarks run and print their figures. The speeds themselves are not tested."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name: str, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a benchmark in this process. Return its JSON output and the text on standard error."""
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setattr("sys.path", list(sys.path))
    specification.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *options.split(), "--json"])
    threads = torch.get_num_threads()
    module.main()
    torch.set_num_threads(threads)
    found = capsys.readouterr()
    return json.loads(found.out), found.err


def test_a_steps_cost_as_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows, said = run("step", "--batch 2 --classes 3 --captions 8 --rounds 1 --device cpu", monkeypatch, capsys)
    assert [(row["classes"], row["captions"]) for row in rows] == [(3, 8)]
    for row in rows:
        for figure in ("over_floor", "over_floor_teacher_online", "faster_than_authors", "share_of_peak"):
            assert row[figure] > 0
    assert said.count("x floor") == 1


def test_streams_against_their_ceiling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = run("streams", "--images 64 --size 48 --pixels 16 --rounds 1 --no-memory", monkeypatch, capsys)
    for figure in ("over_ceiling", "remote_over_ceiling", "kept_over_decoded"):
        assert found[figure] > 0
    assert found["images_per_second"].keys() == {"ceiling", "local", "remote", "kept"}


def test_checkpoints_beside_the_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = run("checkpoint", "--batch 1 --steps 2 --every 1 --rounds 1", monkeypatch, capsys)
    assert found["megabytes"] > 70  # the weights, and two moments of the trained weights
    for figure in ("seconds_a_step", "beside_over_none", "waited_over_none"):
        assert found[figure] > 0


def link_packages(names: list[str], folder: Path) -> None:
    """Link distributions and their requirements, without extras, into a folder that replaces site-packages."""
    linked: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # a requirement for another platform
            continue
        if name in linked:
            continue
        linked.add(name)
        for file in distribution.files or []:
            link = folder / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(file.parts[0]))))
        requirements = [each for each in distribution.requires or [] if "extra ==" not in each]
        names += [re.split(r"[^A-Za-z0-9_.-]", each, maxsplit=1)[0] for each in requirements]


def run_gpu_benchmark(tmp_path: Path, *sections: str) -> tuple[list[dict[str, Any]], str]:
    """Run sections of the GPU benchmark on the CPU, with only its requirements installed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    link_packages(["torch", "open_clip_torch", "webdataset", "pydantic"], packages)
    assert not (packages / "ray").exists()
    out = tmp_path / "gpu.jsonl"
    python = [sys.executable, "-S", str(BENCHMARKS / "gpu.py")]  # -S: do not use the packages of this environment
    environment = os.environ | {"PYTHONPATH": str(packages)}
    done = subprocess.run(
        [*python, "--smoke", "--out", str(out), "--sections", *sections],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result for result in results if "error" in result] == []
    finished = [result["section"] for result in results if result["kind"] == "section"]
    assert finished == list(sections)
    return results, done.stdout


def test_the_gpu_benchmark_runs_with_four_packages(tmp_path: Path) -> None:
    results, _ = run_gpu_benchmark(tmp_path, "device")
    assert {result["kind"] for result in results} >= {"facts", "matrix_product"}


@pytest.mark.slow
def test_the_gpu_benchmark_compares_results(tmp_path: Path) -> None:
    results, output = run_gpu_benchmark(tmp_path, "correctness")
    comparisons = [result for result in results if result["kind"] == "comparison"]
    assert len(comparisons) == 6
    assert all(result["passed"] for result in comparisons)
    assert "## correctness: comparison" in output


@pytest.mark.slow
def test_the_gpu_benchmark_measures_speed(tmp_path: Path) -> None:
    results, _ = run_gpu_benchmark(tmp_path, "step", "data", "profile")
    kinds = {result["kind"] for result in results}
    assert kinds >= {"step", "deterministic", "compiled", "evaluation_jpeg", "training_jpeg"}
    assert kinds >= {"kernel", "synchronisations"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data() -> None:
    options = ["--images", "200", "--size", "64", "--pixels", "32", "--rounds", "1", "--json"]
    command = [sys.executable, str(BENCHMARKS / "streams.py"), *options]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["memory_growth"] < 1.1
