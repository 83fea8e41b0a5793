"""Results do not depend on the number of workers: complete sequences under torch.distributed, without Ray."""

import csv
import socket
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file

from schemas.events import WorkersUsed
from schemas.experiment import Experiment
from schemas.method import PRESETS
from schemas.results import Result
from zscl.runtime.distributed import rank_slice
from zscl.sequence.journal import JournalReader
from zscl.sequence.layout import JOURNAL
from zscl.sequence.run import run_sequence
from zscl.training import throughput
from zscl.training.checkpoint import StoppedError

METHODS = {preset: {"preset": preset} for preset in PRESETS} | {
    "we+wc": {"preset": "we+wc", "average": {"every": 2}},
    "icarl": {"preset": "icarl", "memory": {"budget": 12}},
    "lwf-vr": {"preset": "lwf-vr", "distill": {"random_texts": 17, "random_length": 5}},
    "zscl": {"preset": "zscl", "average": {"every": 2}, "distill": {"similarity_weight": 0.5, "feature_weight": 2.0}},
}
# These settings must not change results, either.
COMPUTE = {
    "zscl*": {"teacher_features": "as_met", "images_at_once": 2},
    "we+wc": {"gradient_checkpointing": True},
    "lwf": {"savings": {"packed_prompts": "never", "used_embeddings": "never", "one_pass": False}},
}
STOPPED = "stopped"
Jobs = list[tuple[str, Path]]


def worker(rank: int, workers: int, port: int, jobs: Jobs) -> None:
    torch.set_num_threads(1)
    throughput.REPORT_SECONDS = 0.0  # report as often as the workers poll
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    for experiment, folder in jobs:
        # Stopped inside the first stage, then inside the second one.
        for stop in (4, 4, 0) if folder.name == STOPPED else (0,):
            asked = count(1)
            with suppress(StoppedError):
                run_sequence(
                    Experiment.model_validate_json(experiment),
                    folder,
                    device=torch.device("cpu"),
                    stop_requested=lambda asked=asked, stop=stop: next(asked) == stop,  # type: ignore[misc]
                )
    dist.destroy_process_group()


def run_with(workers: int, jobs: Jobs) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(worker, (workers, port, jobs), nprocs=workers)  # type: ignore[no-untyped-call]


def losses(folder: Path) -> list[dict[str, float]]:
    rows = []
    for file in sorted(folder.glob("stages/*/losses.csv")):
        with file.open() as stream:
            rows += [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    return rows


def test_world_size_changes_nothing_for_any_preset(
    experiment: Callable[..., Experiment], tasks: list[str], tmp_path: Path
) -> None:
    # Neither 2 nor 3 workers share 7 task images and 5 distilled ones evenly.
    optimisation = {
        "steps": 4, "warmup_steps": 2, "batch_size": 7, "reference_batch_size": 5, "learning_rate": 1e-3,
    }  # fmt: skip
    experiments = {}
    for name, method in METHODS.items():
        compute = {"device": "cpu", **COMPUTE.get(name, {})}
        experiments[name] = experiment(method=method, optimisation=optimisation, tasks=tasks[:2], compute=compute)
    # Stages of a single class: fewer prompts than workers.
    experiments["class-incremental"] = experiment(
        method={"preset": "zscl", "task_loss": {"earlier_names": True}},
        optimisation={**optimisation, "warmup_steps": 1},
        tasks=[],
        class_incremental={"path": tasks[0], "first": 2, "increment": 1},
        compute={"device": "cpu"},
    )
    compute = {"device": "cpu", "checkpoint": {"every_steps": 1}}
    experiments[STOPPED] = experiment(
        method=METHODS["zscl"], optimisation=optimisation, tasks=tasks[:2], compute=compute
    )
    for name, settings in experiments.items():
        run_sequence(settings, tmp_path / "1" / name, device=torch.device("cpu"))
    for workers in (3,):  # two workers: tests/golden
        folder = tmp_path / str(workers)
        run_with(workers, [(settings.model_dump_json(), folder / name) for name, settings in experiments.items()])
        for name in experiments:
            compare(folder / name, tmp_path / "1" / name, workers)
        entries = [entry.progress for entry in JournalReader(folder / STOPPED / JOURNAL).read_new()]
        events = [event for event in entries if isinstance(event, WorkersUsed)]
        assert events
        assert all(len(event.workers) == workers for event in events)
        uninterrupted, stopped = (folder / name for name in ("zscl", STOPPED))
        for file in [*uninterrupted.glob("stages/*/losses.csv"), *uninterrupted.glob("stages/*/model/*.safetensors")]:
            assert file.read_bytes() == (stopped / file.relative_to(uninterrupted)).read_bytes(), file


def compare(folder: Path, single: Path, workers: int) -> None:
    result, expected = (Result.model_validate_json((run / "result.json").read_text()) for run in (folder, single))
    assert result.workers == workers
    assert result.accuracy_matrix == expected.accuracy_matrix
    for step, expected_step in zip(losses(folder), losses(single), strict=True):
        assert step.keys() == expected_step.keys()
        for name, loss in expected_step.items():
            # Consolidation includes the rounding errors of the attention biases; see below.
            assert step[name] == pytest.approx(loss, rel=1e-3 if name == "consolidation" else 2e-4, abs=1e-6), folder
    for file in single.glob("stages/*/model/*.safetensors"):
        model = load_file(folder / file.relative_to(single))
        for name, weights in load_file(file).items():
            if "in_proj_bias" not in name:  # the gradient of its key part is rounding error, which Adam scales up
                assert torch.allclose(model[name], weights, atol=2e-4), (folder, name)


def test_rank_slices_are_even_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zscl.runtime.distributed.world_size", lambda: 3)
    parts = [rank_slice(7, rank) for rank in range(3)]
    assert [index for part in parts for index in part] == list(range(7))
    assert sorted(map(len, parts)) == [2, 2, 3]
