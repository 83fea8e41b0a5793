"""A run that is interrupted anywhere comes to the numbers of one that is not, bit for bit."""

import errno
import json
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from support.data import TINY_MODEL
from support.faults import same

from schemas.compute import Checkpoint
from schemas.events import CheckpointWritten, Note, StepsTaken
from schemas.experiment import Experiment
from zscl.sequence.journal import JournalReader
from zscl.sequence.layout import CHECKPOINT, JOURNAL
from zscl.sequence.run import run_sequence
from zscl.training.checkpoint import CheckpointWriter, StoppedError, read_checkpoint

Make = Callable[..., Experiment]
CPU = torch.device("cpu")
EVERY_STEP = {"device": "cpu", "checkpoint": {"every_steps": 1}}
# Counted from the last stop: inside the first row, then inside a stage or between two cells in turn.
MOMENTS = (2, 4, 6, 5, 3)


def after(asked: int) -> Callable[[], bool]:
    """Answer yes when asked for the so-many-th time."""
    answers: Iterator[bool] = iter([*[False] * (asked - 1), True])
    return lambda: next(answers, False)


def interrupted(made: Experiment, folder: Path, moments: tuple[int, ...] = MOMENTS) -> int:
    """Run with a stop at each of these moments, then to the end. Returns how often it went on inside a stage."""
    said: list[BaseModel] = []
    for moment in moments:
        with pytest.raises(StoppedError):
            run_sequence(made, folder, said.append, CPU, after(moment))
    run_sequence(made, folder, said.append, CPU)
    return sum(isinstance(each, Note) and "resumes after step" in each.text for each in said)


METHODS: dict[str, Any] = {
    "zscl": {"preset": "zscl", "average": {"every": 2}},
    "an exponential average with its start, no feature store": {
        "preset": "we+wc", "average": {"every": 1, "kind": "exponential", "decay": 0.7, "start_share": 0.1},
    },
    "lwf": "lwf",
    "icarl": {"preset": "icarl", "memory": {"budget": 12}},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_stop_and_resume_at_any_step_gives_the_same_numbers(experiment: Make, tmp_path: Path, name: str) -> None:
    made = experiment(method=METHODS[name], compute=EVERY_STEP)
    run_sequence(made, tmp_path / "whole", device=CPU)
    assert interrupted(made, tmp_path / "stopped") >= 2
    same(tmp_path / "whole", tmp_path / "stopped")
    assert not list((tmp_path / "stopped").rglob("*.part*"))
    assert not (tmp_path / "stopped" / CHECKPOINT).exists()


def test_dropout_is_a_function_of_the_step(experiment: Make, tmp_path: Path) -> None:
    model: dict[str, Any] = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.5}}  # type: ignore[dict-item]
    (tmp_path / "clip").mkdir()
    torch.manual_seed(0)
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**model).state_dict(), tmp_path / "clip/open_clip_model.safetensors")
    made = experiment(model=f"local-dir:{tmp_path}/clip", method="finetune", compute=EVERY_STEP)
    run_sequence(made, tmp_path / "whole", device=CPU)
    torch.manual_seed(1)  # whatever else a process drew
    assert interrupted(made, tmp_path / "stopped") >= 2
    same(tmp_path / "whole", tmp_path / "stopped")


def test_the_journal_of_a_resumed_run_has_every_step_once(experiment: Make, tmp_path: Path) -> None:
    made = experiment(method="finetune", compute=EVERY_STEP)
    interrupted(made, tmp_path)
    entries = [entry.progress for entry in JournalReader(tmp_path / JOURNAL).read_new()]
    steps = [(entry.stage, step.step) for entry in entries if isinstance(entry, StepsTaken) for step in entry.steps]
    assert steps == [(stage, step) for stage in (1, 2, 3) for step in range(5)]


def stopped(experiment: Make, folder: Path, **changes: Any) -> Experiment:
    """A run that was stopped behind some step of its first stage."""
    made = experiment(method="finetune", compute=EVERY_STEP, **changes)
    with pytest.raises(StoppedError):
        run_sequence(made, folder, device=CPU, stop_requested=after(6))
    assert (folder / CHECKPOINT).is_file()
    return made


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison(file: Path) -> None:
    """A pickle that would run something."""

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (file.with_name("harmed"),)

    file.write_bytes(pickle.dumps({"stage": 1, "step": 3, "model": Harm()}))


@pytest.mark.fault(
    "A checkpoint cut in half, or a pickle in its place", "Named, never executed; the stage starts again"
)
@pytest.mark.parametrize("spoil", [damage, poison])
def test_a_damaged_checkpoint_restarts_only_its_stage(
    experiment: Make, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    made = stopped(experiment, tmp_path / "run")
    spoil(tmp_path / "run" / CHECKPOINT)
    said: list[BaseModel] = []
    run_sequence(made, tmp_path / "run", said.append, CPU)
    [note] = [each.text for each in said if isinstance(each, Note) and CHECKPOINT in each.text]
    assert "found no readable checkpoint" in note
    assert len(list((tmp_path / "run").glob(f"damaged-*-{CHECKPOINT}"))) == 1
    assert not (tmp_path / "run/harmed").exists()
    run_sequence(made, tmp_path / "whole", device=CPU)
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_reading_a_checkpoint_is_retried(
    experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    made = stopped(experiment, tmp_path / "run")
    load, failures = torch.load, iter(range(1))

    def failing(*given: Any, **named: Any) -> Any:
        for _ in failures:
            raise OSError(number, "storage is away")
        return load(*given, **named)

    monkeypatch.setattr(torch, "load", failing)
    said: list[BaseModel] = []
    run_sequence(made, tmp_path / "run", said.append, CPU)
    assert [each for each in said if isinstance(each, Note) and "resumes after step" in each.text]


def test_an_unreadable_checkpoint_ends_the_run_and_is_not_changed(
    experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stopped(experiment, tmp_path / "run")
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()

    def failing(*given: Any, **named: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(PermissionError):
        run_sequence(made, tmp_path / "run", device=CPU)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_of_other_shapes_restarts_only_its_stage(experiment: Make, tmp_path: Path) -> None:
    stopped(experiment, tmp_path / "run")
    other = experiment(method="finetune", compute={"device": "cpu", "savings": {"used_embeddings": "never"}})
    said: list[BaseModel] = []
    run_sequence(other, tmp_path / "run", said.append, CPU)
    assert [each for each in said if isinstance(each, Note) and "other compute.savings" in each.text]


def test_a_checkpoint_of_a_finished_stage_is_ignored(experiment: Make, tmp_path: Path) -> None:
    made = stopped(experiment, tmp_path / "run")
    left = shutil.copy(tmp_path / "run" / CHECKPOINT, tmp_path / "left")
    run_sequence(made, tmp_path / "whole", device=CPU)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for gone in ("result.json", "stages/2-second", "stages/3-third"):
        path = tmp_path / "again" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(left, tmp_path / "again" / CHECKPOINT)
    run_sequence(made, tmp_path / "again", device=CPU)
    same(tmp_path / "whole", tmp_path / "again")


class TestWriting:
    """Checkpoints by themselves."""

    def state(self, step: int, weight: float = 1.0) -> dict[str, Any]:
        return {"stage": 1, "step": step, "model": {"weight": torch.full((3,), weight)}}

    def test_the_last_checkpoint_stays_when_storage_fails(self, tmp_path: Path) -> None:
        said: list[BaseModel] = []
        file = tmp_path / "run" / CHECKPOINT
        checkpoints = CheckpointWriter(file, Checkpoint(every_steps=1), said.append, lambda: False)
        checkpoints.maybe_save(1, lambda: self.state(1))
        checkpoints.wait()
        file.parent.rename(tmp_path / "gone")
        file.parent.symlink_to(tmp_path / "nowhere")  # storage that is away
        checkpoints.maybe_save(2, lambda: self.state(2))
        checkpoints.wait()
        file.parent.unlink()
        (tmp_path / "gone").rename(file.parent)
        assert said[0] == CheckpointWritten(stage=1, steps=1)
        assert isinstance(said[1], Note)
        assert "checkpoint of stage 1 after step 2 could not be written" in said[1].text
        kept = read_checkpoint(file, 1, on_note=lambda text: None)
        assert kept is not None
        assert kept["step"] == 1

    def test_weights_that_are_not_finite_are_not_written(self, tmp_path: Path) -> None:
        said: list[BaseModel] = []
        checkpoints = CheckpointWriter(tmp_path / CHECKPOINT, Checkpoint(every_steps=1), said.append, lambda: False)
        for step, weight in ((1, 1.0), (2, float("nan"))):
            checkpoints.maybe_save(step, lambda step=step, weight=weight: self.state(step, weight))  # type: ignore[misc]
            checkpoints.wait()
        kept = read_checkpoint(tmp_path / CHECKPOINT, 1, on_note=lambda text: None)
        assert kept is not None
        assert kept["step"] == 1
        assert isinstance(said[1], Note)

    def test_training_continues_while_a_checkpoint_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The copy is what training had then, and no second one is begun before the first is whole."""
        may_end = threading.Event()
        save = torch.save

        def slowly(*arguments: Any) -> None:
            may_end.wait(300)
            save(*arguments)

        monkeypatch.setattr(torch, "save", slowly)
        said: list[BaseModel] = []
        checkpoints = CheckpointWriter(tmp_path / CHECKPOINT, Checkpoint(every_steps=1), said.append, lambda: False)
        state = self.state(1)
        checkpoints.maybe_save(1, lambda: state)
        state["model"]["weight"].fill_(5.0)
        checkpoints.maybe_save(2, lambda: pytest.fail("a second one was begun"))
        may_end.set()
        checkpoints.wait()
        kept = read_checkpoint(tmp_path / CHECKPOINT, 1, on_note=lambda text: None)
        assert kept is not None
        assert torch.equal(kept["model"]["weight"], torch.ones(3))
        checkpoints.maybe_save(3, lambda: self.state(3))  # overdue since step 2
        checkpoints.wait()
        assert said == [CheckpointWritten(stage=1, steps=1), CheckpointWritten(stage=1, steps=3)]
