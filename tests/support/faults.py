"""What it takes to disturb a run, and to see that it came to the numbers of one that was not."""

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

PATIENCE_SECONDS = 900.0  # that an event may take: only what hangs takes longer, on however busy a machine
# On the loopback interface, as the cluster of these tests: Ray knows a node by its address alone.
COMMAND_LINE = """
from orchestrate.cluster.auth import bind_to_loopback
from orchestrate.cli.main import main

with bind_to_loopback():
    main()
"""
TIMED = ("seconds", "images_per_second", "workers", "memory")


def numbers(run: Path) -> dict[str, Any]:
    """What `result.json` says, but for times."""
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    for timed in (result, *result["stages"]):
        for name in [name for name in timed if any(part in name for part in TIMED)]:
            del timed[name]
    return result


def same(first: Path, second: Path) -> None:
    """See that two runs left the same numbers: result, curves and weights, bit for bit."""
    assert numbers(first) == numbers(second)
    for file in [*first.glob("stages/*/losses.csv"), *first.glob("stages/*/model/*.safetensors")]:
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file


def recipe_for_faults(folder: Path, model: str, steps: int = 240) -> Path:
    """Two tasks that take some seconds each to train, to judge and to embed."""
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
        # Workers stop within milliseconds; on a busy machine the signal may reach them late.
        "compute": {"device": "cpu", "checkpoint": {"every_steps": 20}, "grace_seconds": PATIENCE_SECONDS},
    }  # fmt: skip
    YAML(typ="safe").dump(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


def until(happened: Callable[[], object], what: str) -> None:
    """Wait for something that may last no longer than milliseconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {PATIENCE_SECONDS:g} s in vain until {what}")
        time.sleep(0.002)


def trained(run: Path, steps: int) -> Callable[[], bool]:
    """Whether so many steps, over all stages, are in a run's journal by now."""
    reader, found = JournalReader(run / JOURNAL), 0

    def enough() -> bool:
        nonlocal found
        found += sum(len(entry.progress.steps) for entry in reader.read_new() if isinstance(entry.progress, StepsTaken))
        return found >= steps

    return enough


def starts_of(run: Path) -> int:
    """How often a run was begun or taken up."""
    return sum(isinstance(entry.progress, RunStarted) for entry in JournalReader(run / JOURNAL).read_new())


def processes(name: str) -> list[psutil.Process]:
    """Ray's processes of this name, under this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(name in part for part in process.cmdline()[:1]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def train_workers() -> list[psutil.Process]:
    """The processes of Ray Train's worker group."""
    return processes("RayTrainWorker")


def a_worker() -> psutil.Process:
    """One of the worker group, as soon as there is one."""
    until(train_workers, "there is a worker")
    return train_workers()[0]


def add_node(cluster: Any, cpus: int = 2, **variables: str) -> Any:
    """Give a cluster a node, on the loopback interface, with environment variables of its own."""
    with bind_to_loopback():
        return cluster.add_node(num_cpus=cpus, node_ip_address="127.0.0.1", env_vars=variables or None)


@contextmanager
def started(*arguments: object, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command line in a process of its own."""
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
    """Wait for a command to end with this code. Returns what it said on standard error."""
    out, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, f"{out}\n{said}"
    return said
