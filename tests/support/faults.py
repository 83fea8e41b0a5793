"""Helpers to disturb a run, and to compare its results with those of an undisturbed run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ruamel.yaml import YAML
from support.data import coloured_images, make_task

from orchestrate.cluster.auth import bind_to_loopback
from schemas.events import RunStarted, StepsTaken
from zscl.data.tar import write_shards
from zscl.sequence.journal import JournalReader
from zscl.sequence.layout import JOURNAL

PATIENCE_SECONDS = 900.0  # maximum time for an event; only a hanging process exceeds it, even on a busy machine
# Binds to the loopback interface like the cluster of these tests, because Ray identifies a node by its address.
COMMAND_LINE = """
from orchestrate.cluster.auth import bind_to_loopback
from orchestrate.cli.main import main

with bind_to_loopback():
    main()
"""
TIMED = ("seconds", "images_per_second", "workers", "memory")


def numbers(run: Path) -> dict[str, Any]:
    """Return the content of `result.json` without times, speeds, memory and worker statistics."""
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    for timed in (result, *result["stages"]):
        for name in [name for name in timed if any(part in name for part in TIMED)]:
            del timed[name]
    return result


def same(first: Path, second: Path) -> None:
    """Assert that two runs have the same result, loss curves and weights, bit for bit."""
    assert numbers(first) == numbers(second)
    for file in [*first.glob("stages/*/losses.csv"), *first.glob("stages/*/model/*.safetensors")]:
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file


def recipe_for_faults(folder: Path, model: str, steps: int = 240) -> Path:
    """Write a recipe with two tasks. Training, evaluation and teacher features of each task take some seconds."""
    data = folder / "data"
    for seed, name in enumerate(["first", "second"]):
        make_task(data / name, seed, train=60, test=400, shard_images=100)
    samples = ({"png": image, "txt": f"a thing {label}".encode()} for image, label in coloured_images(600, seed=9))
    write_shards(data / "reference", samples, shard_images=100)
    recipe = {
        "name": "tiny",
        "model": model,
        "tasks": [str(data / name) for name in ("first", "second")],
        "reference": str(data / "reference"),
        "method": {"preset": "zscl", "average": {"every": 10}},
        "optimisation": {
            "steps": steps, "warmup_steps": 20, "batch_size": 16, "reference_batch_size": 16, "learning_rate": 0.001,
        },
        # Workers stop within milliseconds, but on a busy machine the signal may reach them late.
        "compute": {"device": "cpu", "checkpoint": {"every_steps": 20}, "grace_seconds": PATIENCE_SECONDS},
    }  # fmt: skip
    YAML(typ="safe").dump(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def until(happened: Callable[[], object], what: str) -> None:
    """Wait for a condition, with a short polling interval, because it may hold for a few milliseconds only."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {PATIENCE_SECONDS:g} s in vain until {what}")
        time.sleep(0.002)


def trained(run: Path, steps: int) -> Callable[[], bool]:
    """Return a function that tells whether the run's journal has this number of steps, summed over stages."""
    reader, found = JournalReader(run / JOURNAL), 0

    def enough() -> bool:
        nonlocal found
        found += sum(len(entry.progress.steps) for entry in reader.read_new() if isinstance(entry.progress, StepsTaken))
        return found >= steps

    return enough


def starts_of(run: Path) -> int:
    """Return how often a run was started or resumed."""
    return sum(isinstance(entry.progress, RunStarted) for entry in JournalReader(run / JOURNAL).read_new())


def processes(name: str) -> list[psutil.Process]:
    """Return the Ray processes with this name among the descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(name in part for part in process.cmdline()[:1]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def train_workers() -> list[psutil.Process]:
    """Return the processes of Ray Train's worker group."""
    return processes("RayTrainWorker")


def a_worker() -> psutil.Process:
    """Wait until the worker group has a process, and return one of its processes."""
    until(train_workers, "there is a worker")
    return train_workers()[0]


def add_node(cluster: Any, cpus: int = 2, **variables: str) -> Any:
    """Add a node on the loopback interface to a cluster, with additional environment variables."""
    with bind_to_loopback():
        return cluster.add_node(num_cpus=cpus, node_ip_address="127.0.0.1", env_vars=variables or None)


@contextmanager
def started(*arguments: object, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Context manager: start the command line in a new process, and kill it at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND_LINE, *map(str, arguments)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """Assert that a command ends with this exit code, and return its standard error."""
    out, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, f"{out}\n{said}"
    return said
