"""Checks before a run is started: disk space, prompts, unusable samples, the cluster."""

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.data import coloured_images, make_task, write_tar
from support.errors import refused

from orchestrate.cluster import connect as cluster
from orchestrate.runs import preflight
from orchestrate.runs import run as running
from schemas.errors import ErrorCode
from schemas.experiment import Experiment
from zscl.data.tar import Member, list_members
from zscl.datasets.task_writer import write_task
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence

pytest_plugins = ["support.object_storage"]
Make = Callable[..., Experiment]


def test_disk_usage_is_estimated(experiment: Make, tmp_path: Path) -> None:
    compute = {"device": "cpu", "snapshots_every": 2}
    finetune = experiment(method="finetune", compute=compute)
    resolved = resolve(finetune)
    model = preflight.model_megabytes(resolved)
    run = tmp_path / "run"
    # Three stages of a model and its snapshots after steps 0, 2, 4 and the last one; a checkpoint twice.
    assert preflight.megabytes_needed(resolved, run) == pytest.approx(3 * 5 * model + 8 * model)
    run_sequence(finetune, run, device=torch.device("cpu"))
    written = sum(file.stat().st_size for file in run.rglob("*.safetensors")) / 1e6
    assert written == pytest.approx(3 * 5 * model, rel=0.01)
    assert preflight.megabytes_needed(resolved, run) == 0


def test_a_full_disk(experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve(experiment())
    preflight.check_disk(resolved, tmp_path / "not/there/yet")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with refused(ErrorCode.NO_SPACE, "--out") as error:
        preflight.check_disk(resolved, tmp_path / "run")
    assert "found 2 MB free" in str(error.value)


def test_truncated_prompts_are_reported(experiment: Make, tmp_path: Path) -> None:
    assert preflight.collect_warnings(resolve(experiment())) == []
    long = "a picture of a very small and nearly square patch of {c}"  # the model reads twelve tokens
    splits = {split: list(coloured_images(8, 0)) for split in ("train", "test")}
    write_task(tmp_path / "long", ["red", "green", "blue", "yellow"], [long, "{c}"], splits, suffix="png", source="")
    [sentence, equal] = preflight.collect_warnings(resolve(experiment(tasks=[str(tmp_path / "long")])))
    assert "the model truncates: 'a picture of a very small" in sentence
    assert "found prompts of more than 12 tokens, which the model truncates" in sentence
    assert "found the classes 'red' (0), 'green' (1), 'blue' (2), 'yellow' (3) with the same tokens" in equal


def test_classes_with_the_same_name_are_reported(experiment: Make, tmp_path: Path) -> None:
    splits = {split: list(coloured_images(8, 0)) for split in ("train", "test")}
    write_task(tmp_path / "birds", ["crane", "heron", "crane", "owl"], ["a {c}"], splits, suffix="png", source="")
    [sentence] = preflight.collect_warnings(resolve(experiment(tasks=[str(tmp_path / "birds")])))
    assert sentence == ("task 'birds': found the name 'crane' for the classes 0, 2; prompts cannot distinguish them")


@pytest.mark.parametrize("class_incremental", [False, True])
def test_classes_with_the_same_tokens_are_reported(experiment: Make, tmp_path: Path, class_incremental: bool) -> None:
    splits = {split: list(coloured_images(8, 0)) for split in ("train", "test")}
    write_task(tmp_path / "letters", ["A", "b", "a", " \u00a0B "], ["a {c}"], splits, suffix="png", source="")
    path = str(tmp_path / "letters")
    scenario = {"path": path, "first": 2, "increment": 2, "order": 0}
    changes: dict[str, Any] = {"class_incremental": scenario, "tasks": []} if class_incremental else {"tasks": [path]}
    changes["optimisation"] = {"steps": 1, "warmup_steps": 1, "batch_size": 4, "reference_batch_size": 4}
    sentences = preflight.collect_warnings(resolve(experiment(method="finetune", **changes)))
    warnings = [sentence for sentence in sentences if "the same tokens" in sentence]
    assert [sentence.partition("found the ")[2] for sentence in warnings] == [
        f"classes {classes} with the same tokens in the prompt 'a {{c}}'; the model cannot distinguish them"
        for classes in ("'A' (0), 'a' (2)", "'b' (1), 'B' (3)")
    ]


def test_remote_shards_for_several_readers(experiment: Make, bucket: Any, tasks: list[str]) -> None:
    bucket.put(f"{tasks[0]}/", "bucket/task/", recursive=True)
    compute = {"device": "cpu", "workers": 2, "loader_processes": 3}
    remote = experiment(tasks=["s3://bucket/task"], compute=compute)
    [sentence] = preflight.collect_warnings(resolve(remote))
    assert sentence.startswith("task 'task': each of 6 readers")
    assert preflight.collect_warnings(resolve(experiment(tasks=["s3://bucket/task"]))) == []


def test_a_folder_that_a_node_cannot_write(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    cluster.check_shared_folder(tmp_path / "single node")
    assert not (tmp_path / "single node").exists()  # no other node has to see it
    [node] = ray.nodes()
    monkeypatch.setattr(cluster, "current_node_id", lambda: "another node")
    cluster.check_shared_folder(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    address = node["NodeManagerAddress"]
    with refused(ErrorCode.NOT_FOUND) as error:
        cluster.check_shared_folder(tmp_path / "not/there")
    assert f"node {address} does not see this folder" in str(error.value)


def test_a_dry_run_checks_a_cluster_that_is_named(
    ray_cluster: None, experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(stderr=True)
    assert "cluster" not in running.plan_run(resolve(experiment()), tmp_path / "run", console)
    monkeypatch.setenv("RAY_ADDRESS", "the one that we are connected to")
    plan = running.plan_run(resolve(experiment()), tmp_path / "run", console)
    assert plan["cluster"] == {"nodes": 1, "CPU": 4.0}
    many = experiment(compute={"device": "cpu", "workers": 5})
    with refused(ErrorCode.FAILED) as error:
        running.plan_run(resolve(many), tmp_path / "run", console)
    assert "compute.workers: 5 workers would need 5 CPUs, found 4" in str(error.value)


@pytest.fixture
def odd_task(tmp_path: Path) -> Path:
    """A task with 2 unusable samples of 24, one sample with a dot in its key, and a shard that is not counted."""
    folder = make_task(tmp_path / "odd", seed=0, train=22, shard_images=50)
    (folder / "zscl.json").unlink()
    with tarfile.open(folder / "train/0.tar") as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    members = [(name.replace("0000000.", "v1.0."), content) for name, content in members]
    write_tar(folder / "train/0.tar", [*members, ("x.bmp", b"BM"), ("x.cls", b"0"), ("y.png", members[0][1])])
    shutil.copy(folder / "train/0.tar", folder / "train/1.tar")
    return folder


def test_samples_that_would_be_skipped_are_reported(experiment: Make, odd_task: Path) -> None:
    images, texts = str(odd_task / "train/0.tar"), str(odd_task / "classnames.txt")
    changes: dict[str, Any] = {"tasks": [str(odd_task)], "reference": {"images": [images], "texts": texts}}
    tolerant = experiment(**changes, compute={"device": "cpu", "max_broken_share": 0.1})
    resolved = preflight.prepare(tolerant)
    skipped, dotted, uncounted, references, _ = preflight.collect_warnings(resolved)
    assert "train: found 1 sample whose key has a dot (v1.0). Here a key ends at the last dot" in dotted
    assert "train: found 1 shard (1.tar) beyond the number in nshards.txt; extra shards are never read" in uncounted
    assert "2 samples will be skipped: " in skipped
    assert "odd/train/0.tar: sample 'x' cannot be used (unsupported image format: found x.bmp" in skipped
    assert "odd/train/0.tar: sample 'y' has no .cls member, expected its label in y.cls" in skipped
    assert references.startswith("reference.images: 1 sample will be skipped: ")
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        preflight.prepare(experiment(**changes))
    assert "found 2 unusable samples of 24" in str(error.value)


def test_shots_do_not_hide_unusable_samples(experiment: Make, odd_task: Path) -> None:
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        preflight.prepare(experiment(tasks=[{"path": str(odd_task), "shots": 2}]))
    assert "found 2 unusable samples of 24" in str(error.value)


def test_unusable_reference_images_are_counted(experiment: Make, tmp_path: Path) -> None:
    for number, (image, _) in enumerate(coloured_images(10, 0)):
        (tmp_path / f"{number}.{'tif' if number == 3 else 'png'}").write_bytes(image)
    (tmp_path / "captions.txt").write_text("red\ngreen\n")
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        preflight.prepare(experiment(reference=str(tmp_path)))
    assert "sample '3' cannot be used" in str(error.value)


def test_masks_among_reference_images_are_reported(experiment: Make, tmp_path: Path) -> None:
    image = next(coloured_images(1, 0))[0]
    members = [(f"{key}.{suffix}", image) for key in ("x", "y") for suffix in ("jpg", "seg.png")]
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "captions.txt").write_text("red\ngreen\n")
    [dotted] = preflight.collect_warnings(preflight.prepare(experiment(reference=str(tmp_path))))
    assert dotted.startswith("reference.images: found 2 samples whose keys have dots (x.seg, y.seg). ")
    (tmp_path / "0.tar").unlink()
    (tmp_path / "a.loose.png").write_bytes(image)  # dots in file names are allowed
    assert preflight.collect_warnings(preflight.prepare(experiment(reference=str(tmp_path)))) == []


def test_shots_do_not_index_a_shard_again(experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_task(tmp_path / "some", seed=0)
    read: list[Path] = []

    def recording(file: Path) -> list[Member]:
        read.append(file)
        return list_members(file)

    monkeypatch.setattr("zscl.data.indexed.list_members", recording)
    counts = []
    for shots in (None, 2):
        read.clear()
        preflight.collect_warnings(preflight.prepare(experiment(tasks=[{"path": str(folder), "shots": shots}])))
        counts.append(len(read))
    assert counts[0] == counts[1] > 0


def test_an_invalid_pattern_is_refused(experiment: Make, tmp_path: Path) -> None:
    pattern = str(Path.cwd() / "a**b.tar")
    with refused(ErrorCode.UNREADABLE) as error:
        preflight.prepare(experiment(reference=pattern), tmp_path / "r.yaml")
    assert "a**b.tar" in str(error.value)
