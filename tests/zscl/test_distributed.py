"""Any number of workers gives the numbers of one: a whole sequence under torch.distributed, without Ray."""

import csv
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file

from schemas.experiment import Experiment
from schemas.results import Result
from zscl.distributed import share
from zscl.sequence import run_sequence


def worker(rank: int, workers: int, port: int, experiment: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    run_sequence(Experiment.model_validate_json(experiment), Path(folder), device=torch.device("cpu"))
    dist.destroy_process_group()


def run_with(workers: int, experiment: Experiment, folder: Path) -> Result:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(worker, (workers, port, experiment.model_dump_json(), str(folder)), nprocs=workers)  # type: ignore[no-untyped-call]
    return Result.model_validate_json((folder / "result.json").read_text())


def losses(folder: Path) -> list[list[float]]:
    rows = []
    for file in sorted(folder.glob("stages/*/losses.csv")):
        with file.open() as stream:
            rows += [[float(value) for value in row] for row in list(csv.reader(stream))[1:]]
    return rows


@pytest.mark.parametrize("method", ["finetune", {"preset": "zscl", "average": {"every": 2}}])
def test_world_size_changes_nothing(experiment: Callable[..., Experiment], tmp_path: Path, method: object) -> None:
    # 2 workers share the batches evenly, 3 do not: 6 task images and 5 reference images.
    made = experiment(method=method, optimisation={"steps": 6, "warmup_steps": 2, "batch_size": 7,
                                                   "reference_batch_size": 5, "learning_rate": 1e-3})  # fmt: skip
    alone = run_sequence(made, tmp_path / "1", device=torch.device("cpu"))
    weights = load_file(tmp_path / "1/stages/3-third/model/open_clip_model.safetensors")
    for workers in (2, 3):
        folder = tmp_path / str(workers)
        together = run_with(workers, made, folder)
        assert together.workers == workers
        assert together.accuracy_matrix == alone.accuracy_matrix
        for ours, theirs in zip(losses(folder), losses(tmp_path / "1"), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)
        for name, found in load_file(folder / "stages/3-third/model/open_clip_model.safetensors").items():
            if "in_proj_bias" not in name:  # its key third has no gradient but round-off, which Adam makes steps of
                assert torch.allclose(found, weights[name], atol=2e-4), name


def test_shares_are_even_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zscl.distributed.world_size", lambda: 3)
    parts = [share(7, rank) for rank in range(3)]
    assert [index for part in parts for index in part] == list(range(7))
    assert sorted(map(len, parts)) == [2, 2, 3]
