"""A whole sequence in one plain process."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file
from support.data import make_task
from support.errors import refused

from schemas.errors import ErrorCode
from schemas.events import Note, StepsTaken
from schemas.experiment import Experiment
from schemas.results import Result
from zscl.data.shard_urls import open_samples
from zscl.data.task import TaskFolder
from zscl.methods.interfaces import Teacher
from zscl.models.clip import freeze, load_clip
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence
from zscl.training.stage import train_stage

CPU = torch.device("cpu")


def test_leaves_the_documented_folder(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    result = run_sequence(experiment(), tmp_path, device=CPU)
    assert result == Result.model_validate_json((tmp_path / "result.json").read_text())
    assert [len(row) for row in result.accuracy_matrix] == [3, 3, 3]
    assert [stage.merges for stage in result.stages] == [4, 4, 4]  # the start and after steps 0, 2, 4; 5 is no multiple
    for stage, name in enumerate(["first", "second", "third"], start=1):
        place = tmp_path / "stages" / f"{stage}-{name}"
        assert sorted(file.name for file in place.iterdir()) == [
            "accuracy.json", "losses.csv", "model", "training.json",
        ]  # fmt: skip
        assert len((place / "losses.csv").read_text().splitlines()) == 1 + 5
    assert not list(tmp_path.rglob("*.partial"))


def test_a_stage_reproduces_its_accuracy_in_open_clip(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    made = experiment(method="finetune")
    result = run_sequence(made, tmp_path, device=CPU)
    name = f"local-dir:{tmp_path}/stages/1-first/model"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    task = TaskFolder.open(made.tasks[0])
    model.eval()
    with torch.no_grad():
        embeddings = []
        for classname in task.classnames:
            prompts = [template.replace("{c}", classname) for template in task.templates]
            embedded = torch.nn.functional.normalize(model.encode_text(tokenizer(prompts)), dim=-1).mean(0)
            embeddings.append(embedded / embedded.norm())
        correct = []
        for sample in task.test.iter_shard(0, 1):
            image = transform(Image.open(io.BytesIO(sample.image)))[None]
            logits = model.encode_image(image) @ torch.stack(embeddings).T
            correct.append(int(logits.argmax()) == int(sample.label or b"-1"))
    assert sum(correct) / len(correct) == pytest.approx(result.accuracy_matrix[0][0], abs=1e-12)


def test_the_seed_determines_the_numbers(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    losses = []
    for run, seed in enumerate([3, 3, 4]):
        run_sequence(experiment(seed=seed), tmp_path / str(run), device=CPU)
        losses.append((tmp_path / str(run) / "stages/2-second/losses.csv").read_text())
    assert losses[0] == losses[1] != losses[2]


def test_resumes_after_the_last_finished_stage(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    class InterruptedRunError(Exception):
        pass

    def interrupt(progress: BaseModel) -> None:
        if isinstance(progress, StepsTaken) and progress.stage == 2:
            raise InterruptedRunError

    whole = run_sequence(experiment(), tmp_path / "whole", device=CPU)
    with pytest.raises(InterruptedRunError):
        run_sequence(experiment(), tmp_path / "cut", report=interrupt, device=CPU)
    first = tmp_path / "cut/stages/1-first/model/open_clip_model.safetensors"
    written = first.stat().st_mtime_ns
    leftover = tmp_path / "cut/stages/.2-second.999.partial"
    leftover.mkdir()
    said: list[BaseModel] = []
    resumed = run_sequence(experiment(), tmp_path / "cut", report=said.append, device=CPU)
    assert not leftover.exists()
    assert any(isinstance(note, Note) and "trained stages found: 1" in note.text for note in said)
    assert first.stat().st_mtime_ns == written
    assert resumed.accuracy_matrix == whole.accuracy_matrix
    for stage in ("1-first", "2-second", "3-third"):
        assert (tmp_path / "cut/stages" / stage / "losses.csv").read_text() == (
            tmp_path / "whole/stages" / stage / "losses.csv"
        ).read_text()


def test_refuses_the_folder_of_another_experiment(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    run_sequence(experiment(method="zero-shot"), tmp_path, device=CPU)
    before = (tmp_path / "result.json").read_text()
    with refused(ErrorCode.OTHER_RUN):
        run_sequence(experiment(), tmp_path, device=CPU)
    assert (tmp_path / "result.json").read_text() == before


def test_zero_shot_repeats_its_row_and_trains_nothing(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    result = run_sequence(experiment(method="zero-shot"), tmp_path, device=CPU)
    assert result.accuracy_matrix == (result.zero_shot,) * 3
    assert result.stages == ()
    assert result.metrics == result.zero_shot_metrics


def test_the_teacher_embeds_the_reference_texts_once(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    encode = __import__("zscl.methods.distillation_texts", fromlist=["_encode_rank_texts"])._encode_rank_texts

    def counted(teacher: torch.nn.Module, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
        embedded.append(len(tokens))
        return encode(teacher, tokens, device)

    monkeypatch.setattr("zscl.methods.distillation_texts._encode_rank_texts", counted)
    for name, seed in (("one", 0), ("two", 1)):
        run_sequence(experiment(seed=seed), tmp_path / name, device=CPU)
    assert embedded == [14]
    assert json.loads((tmp_path / "two/result.json").read_text())["reference_texts"] == 14


def test_tasks_may_be_streamed_from_urls(
    experiment: Callable[..., Experiment], tasks: list[str], tmp_path: Path
) -> None:
    here = run_sequence(experiment(), tmp_path / "here", device=CPU)
    urls = [f"file://{task}" for task in tasks]
    there = run_sequence(experiment(tasks=urls), tmp_path / "there", device=CPU)
    assert there.zero_shot == here.zero_shot
    assert [task.test_images for task in there.tasks] == [10, 10, 10]
    assert [stage.steps for stage in there.stages] == [5, 5, 5]


def test_bf16_is_close_to_fp32_but_different(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        optimisation = experiment().optimisation.model_dump() | {"precision": precision}
        result = run_sequence(experiment(optimisation=optimisation), tmp_path / precision, device=CPU)
        found[precision] = result.stages[0].losses
        assert (
            load_file(tmp_path / precision / "stages/1-first/model/open_clip_model.safetensors")["visual.proj"].dtype
            == torch.float32
        )
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.15)


def test_a_run_equals_its_stages_with_the_initial_model_as_teacher(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    made = experiment()
    run_sequence(made, tmp_path, device=CPU)
    opened, clip = resolve(made), load_clip(made.model)
    assert opened.reference is not None
    initial = freeze(deepcopy(clip.model))
    with torch.no_grad():
        texts = initial.encode_text(clip.tokenizer(opened.reference.texts), normalize=True)  # type: ignore[operator]
    for stage, task in enumerate(opened.tasks, start=1):
        [(model, _)], steps = train_stage(
            made,
            stage,
            task,
            clip,
            Teacher(opened.reference.images, texts, lambda images, _: initial.encode_image(images, normalize=True)),  # type: ignore[operator]
            (),
            CPU,
            report=lambda taken: None,
        )
        place = tmp_path / "stages" / f"{stage}-{task.name}"
        written = load_file(place / "model/open_clip_model.safetensors")
        for name, value in model.state_dict().items():
            assert torch.equal(written[name], value), (stage, name)
        with (place / "losses.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert [{name: float(row[name]) for name in steps[0].losses} for row in rows] == [step.losses for step in steps]
        clip.model.load_state_dict(model.state_dict())


def test_a_loss_that_is_not_finite_ends_the_run_after_the_stages_before(
    experiment: Callable[..., Experiment], tasks: list[str], tmp_path: Path
) -> None:
    broken = experiment(tasks=[tasks[0], {"path": tasks[1], "learning_rate": 1e30}])
    with refused(ErrorCode.NOT_FINITE) as error:
        run_sequence(broken, tmp_path, device=CPU)
    assert "stage 2 second: found the loss" in str(error.value)
    assert f"the last good model is local-dir:{tmp_path}/stages/1-first/model" in str(error.value)
    assert [place.name for place in (tmp_path / "stages").iterdir()] == ["1-first"]


def weights_of(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "stages" / stage / "model/open_clip_model.safetensors")
    return found


@pytest.mark.parametrize("anchor", ["stage_start", "initial"])
def test_wise_ft_interpolates_each_stage_with_its_anchor(
    experiment: Callable[..., Experiment], tasks: list[str], tmp_path: Path, anchor: str
) -> None:
    made = experiment(method={"preset": "wise-ft", "merge": {"anchor": anchor, "share": 0.25}}, tasks=tasks[:2])
    run_sequence(made, tmp_path / "merged", device=CPU)
    initial = load_clip(made.model)
    start = {"1-first": initial.model.state_dict(), "2-second": weights_of(tmp_path / "merged", "1-first")}
    for stage, (place, weights) in enumerate(start.items(), start=1):
        clip = load_clip(made.model)
        clip.model.load_state_dict(weights)
        task = resolve(made).tasks[stage - 1]
        [(model, _)], _ = train_stage(made, stage, task, clip, None, (), CPU, report=lambda taken: None)
        anchored = weights if anchor == "stage_start" else initial.model.state_dict()
        for name, found in weights_of(tmp_path / "merged", place).items():
            expected = 0.75 * model.state_dict()[name] + 0.25 * anchored[name]
            assert torch.allclose(found, expected, atol=1e-6), (place, name)


@pytest.mark.parametrize(("train", "frozen"), [("image_tower", "text"), ("text_tower", "visual")])
def test_one_tower_may_be_trained_alone(
    experiment: Callable[..., Experiment], tasks: list[str], tmp_path: Path, train: str, frozen: str
) -> None:
    made = experiment(method={"preset": "finetune", "train": train}, tasks=tasks[:1])
    run_sequence(made, tmp_path, device=CPU)
    before, after = load_clip(made.model).model.state_dict(), weights_of(tmp_path, "1-first")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("visual.") == (frozen == "text") for name in moved)


@pytest.mark.parametrize(("teacher", "blend"), [("previous", 0.8), ("blended", 1.0)])
def test_the_previous_model_teaches_the_next_stage(
    experiment: Callable[..., Experiment], tmp_path: Path, teacher: str, blend: float
) -> None:
    made = experiment(method={"preset": "zscl", "average": None, "distill": {"teacher": teacher, "blend": blend}})
    run_sequence(made, tmp_path / "previous", device=CPU)
    same = experiment(method={"preset": "zscl", "average": None})
    run_sequence(same, tmp_path / "initial", device=CPU)

    def losses(folder: str, stage: str) -> str:
        return (tmp_path / folder / "stages" / stage / "losses.csv").read_text()

    assert losses("previous", "1-first") == losses("initial", "1-first")  # the previous model is the initial one
    assert losses("previous", "2-second") != losses("initial", "2-second")


def test_a_teacher_blended_with_share_0_is_the_initial_model(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    results = []
    for name, distill in (("blended", {"teacher": "blended", "blend": 0.0}), ("initial", {"teacher": "initial"})):
        made = experiment(method={"preset": "zscl", "average": None, "distill": distill})
        results.append(run_sequence(made, tmp_path / name, device=CPU))
    for blended, initial in zip(results[0].stages, results[1].stages, strict=True):
        assert blended.losses == pytest.approx(initial.losses, rel=1e-5)


def test_icarl_distils_on_the_exemplars(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    made = experiment(method={"preset": "icarl", "memory": {"budget": 16}})
    result = run_sequence(made, tmp_path, device=CPU)
    assert set(result.stages[0].losses) == {"classification"}  # nothing to remember yet
    for stage in result.stages[1:]:
        assert set(stage.losses) == {"classification", "image_distillation", "text_distillation"}
    kept = {
        place.parent.name: len(list(open_samples([str(place)]).iter_shard(0, 1)))
        for place in tmp_path.glob("stages/*/exemplars")
    }
    assert kept == {"1-first": 16, "2-second": 8}  # four classes: 16 for the only task, then 8 for each of two


def test_icarl_resumes_with_the_same_exemplars(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    made = experiment(method={"preset": "icarl", "memory": {"budget": 16}})
    whole = run_sequence(made, tmp_path / "whole", device=CPU)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/result.json").unlink()
    shutil.rmtree(tmp_path / "cut/stages/3-third")
    resumed = run_sequence(made, tmp_path / "cut", device=CPU)
    assert resumed.stages[2].losses == whole.stages[2].losses
    assert resumed.accuracy_matrix == whole.accuracy_matrix


def test_refuses_a_memory_too_small_for_the_classes(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    with refused(ErrorCode.INVALID_VALUE, "method.memory.budget") as error:
        run_sequence(experiment(method={"preset": "icarl", "memory": {"budget": 7}}), tmp_path, device=CPU)
    assert "found 7, expected at least 8" in str(error.value)


def test_broken_samples_are_skipped_counted_and_named_in_the_result(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    task = make_task(tmp_path / "task", seed=0, train=30, test=20, shard_images=50)
    (task / "zscl.json").unlink()
    for split in ("train", "test"):
        shard = task / split / "0.tar"
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00PNG", 1))
    said: list[str] = []
    made = experiment(
        tasks=[str(task)],
        method={"preset": "icarl", "memory": {"budget": 8}},
        compute={"device": "cpu", "max_broken_share": 0.05},
        optimisation={"steps": 8, "warmup_steps": 1, "batch_size": 6, "learning_rate": 0.01},
    )
    result = run_sequence(made, tmp_path / "run", device=CPU, report=lambda each: said.append(str(each)))
    assert [(task.test_images, task.broken_test_images) for task in result.tasks] == [(19, 1)]
    [stage] = result.stages
    assert len(stage.broken) == 1
    assert f"{task}/train/0.tar: sample '0000000' is no readable image" in stage.broken[0]
    assert any("skipped" in line and "test/0.tar: sample '0000000'" in line for line in said)
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        run_sequence(experiment(tasks=[str(task)]), tmp_path / "strict", device=CPU)
    assert "found 1 unusable samples of 20" in str(error.value)
