"""Rows of the matrix: cells that are known are not measured again, and a failed stage is said to be one."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from support.errors import refused

from orchestrate.runs.preflight import check_run_folder_is_same
from schemas.algorithm import algorithm_version
from schemas.errors import ErrorCode, InputError
from schemas.events import Note, RowMeasured, StageTrained, TaskEvaluated
from schemas.experiment import Experiment
from zscl.evaluation.metrics import is_at_chance
from zscl.runtime.atomic_io import write_text
from zscl.sequence.async_matrix import Handle, SubmitEvaluation
from zscl.sequence.layout import stage_files
from zscl.sequence.resolve import resolve
from zscl.sequence.result import check_run_folder, check_same_run
from zscl.sequence.run import measure_row, run_sequence
from zscl.training.checkpoint import StoppedError

Make = Callable[..., Experiment]
CPU = torch.device("cpu")


@pytest.mark.fault("Stopped between two cells of a row", "Evaluated cells are not evaluated again")
def test_complete_cells_are_not_measured_again(experiment: Make, tmp_path: Path) -> None:
    made, said = experiment(method="zero-shot", reference=None), list[BaseModel]()
    asked = iter([False, False, True])
    with pytest.raises(StoppedError, match="while the row of stage 0 is measured"):
        run_sequence(made, tmp_path, said.append, CPU, lambda: next(asked))
    assert [each.task for each in said if isinstance(each, TaskEvaluated)] == ["first", "second"]
    assert (tmp_path / "zero_shot.part.json").is_file()
    said.clear()
    result = run_sequence(made, tmp_path, said.append, CPU)
    assert [each.task for each in said if isinstance(each, TaskEvaluated)] == ["third"]
    assert result.zero_shot == run_sequence(made, tmp_path.with_name("whole"), device=CPU).zero_shot
    assert not (tmp_path / "zero_shot.part.json").exists()


def test_cells_of_another_experiment_are_refused(experiment: Make, tmp_path: Path) -> None:
    made, asked = experiment(method="zero-shot", reference=None), iter([False, True])
    with pytest.raises(StoppedError):
        run_sequence(made, tmp_path, device=CPU, stop_requested=lambda: next(asked))
    with refused(ErrorCode.OTHER_RUN):
        check_same_run(tmp_path, "another")


@pytest.mark.parametrize("recorded", [{"algorithm": "0.9"}, {}])
def test_rows_of_another_version_of_the_algorithm_are_refused(
    experiment: Make, tmp_path: Path, recorded: dict[str, str]
) -> None:
    made = experiment(method="zero-shot", reference=None)
    run_sequence(made, tmp_path, device=CPU)
    row = json.loads((tmp_path / "zero_shot.json").read_text())
    assert row.pop("algorithm") == algorithm_version()
    (tmp_path / "zero_shot.json").write_text(json.dumps(row | recorded | {"fingerprint": "0123456789abcdef"}))
    found = "algorithm version 0.9" if recorded else "an algorithm older than version 1.1"
    with refused(ErrorCode.OTHER_ALGORITHM) as error:
        run_sequence(made, tmp_path, device=CPU)
    assert f"found a run of {found}, expected algorithm version {algorithm_version()}" in str(error.value)
    with refused(ErrorCode.OTHER_ALGORITHM) as error:  # the command line, too: not "the data is another"
        check_run_folder_is_same(resolve(made), tmp_path)
    assert str(error.value).endswith("for example for `zscl compare`")


@pytest.mark.fault("A task at chance level right after its training", "A warning in the result")
def test_a_stage_at_chance_gives_a_warning(experiment: Make, tmp_path: Path) -> None:
    """One step at next to no learning rate: the random model stays where guessing among four colours is."""
    optimisation = {"steps": 1, "warmup_steps": 0, "batch_size": 4, "learning_rate": 1e-12}
    said: list[BaseModel] = []
    result = run_sequence(experiment(method="finetune", optimisation=optimisation), tmp_path, said.append, CPU)
    guessed = [task for task, row in zip(("first", "second", "third"), result.accuracy_matrix, strict=True)
               if row[("first", "second", "third").index(task)] <= 0.5]  # fmt: skip
    assert guessed
    assert [sentence.split(":")[0] for sentence in result.warnings] == [
        f"stage {('first', 'second', 'third').index(task) + 1} {task}" for task in guessed
    ]
    assert "which is not clearly above guessing among 4 classes (25.0)" in result.warnings[0]
    assert f"warning: {result.warnings[0]}" in [each.text for each in said if isinstance(each, Note)]


@pytest.mark.parametrize(
    ("accuracy", "classes", "images", "expected"),
    [
        (0.25, 4, 100, True),
        (0.33, 4, 100, True),  # 25 images, and two standard deviations are 8.7
        (0.34, 4, 100, False),
        (0.26, 4, 10_000, False),
        (0.02, 100, 50, True),
        (0.9, 2, 1, True),  # one image tells nothing
        (1.0, 1, 10, False),  # nothing to tell apart
    ],
)
def test_chance(accuracy: float, classes: int, images: int, expected: bool) -> None:
    assert is_at_chance(accuracy, classes, images) is expected


# -------------------------------------------------------------------------------------------------- elsewhere


def measure(recipe: str, folder: Path, stage: int, pause: float) -> None:
    time.sleep(pause)
    measure_row(Experiment.model_validate_json(recipe), folder, stage, torch.device("cpu"), lambda: False)


def elsewhere(made: Experiment, folder: Path, pool: Executor, pause: float = 0.0) -> SubmitEvaluation:
    """Measure rows in a pool, each after a pause."""
    return lambda stage: pool.submit(measure, made.model_dump_json(), folder, stage, pause)


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """A process of its own: what is random in a model under training must not be drawn by two threads."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_asynchronous_evaluation_gives_the_same_matrix(
    experiment: Callable[..., Experiment], tmp_path: Path, process: Executor
) -> None:
    made = experiment(method="finetune")
    inline = run_sequence(made, tmp_path / "inline", device=torch.device("cpu"))
    told: list[object] = []
    there = elsewhere(made, tmp_path / "run", process, pause=0.4)
    found = run_sequence(made, tmp_path / "run", told.append, torch.device("cpu"), submit_evaluation=there)
    assert (found.accuracy_matrix, found.zero_shot) == (inline.accuracy_matrix, inline.zero_shot)
    assert found.warnings == inline.warnings
    rows = [each.stage for each in told if isinstance(each, RowMeasured)]
    assert rows == [0, 1, 2, 3]
    order = [
        (type(each).__name__, each.stage if isinstance(each, RowMeasured) else each.result.stage)
        for each in told
        if isinstance(each, RowMeasured | StageTrained)
    ]
    # Training does not wait, up to a point.
    assert order.index(("StageTrained", 1)) < order.index(("RowMeasured", 0))
    assert order.index(("RowMeasured", 0)) < order.index(("StageTrained", 3))


def test_asynchronous_evaluation_is_resumed(
    experiment: Callable[..., Experiment], tmp_path: Path, process: Executor
) -> None:
    made, run = experiment(method="finetune"), tmp_path / "run"
    with pytest.raises(StoppedError):
        run_sequence(
            made, run, device=torch.device("cpu"), stop_requested=(run / "zero_shot.json").is_file,
            submit_evaluation=elsewhere(made, run, process, pause=0.2),
        )  # fmt: skip
    begun: list[int] = []

    def counted(stage: int) -> Handle:
        begun.append(stage)
        return elsewhere(made, run, process)(stage)

    found = run_sequence(made, run, device=torch.device("cpu"), submit_evaluation=counted)
    assert begun
    assert 0 not in begun
    whole = run_sequence(made, tmp_path / "whole", device=torch.device("cpu"))
    assert found.accuracy_matrix == whole.accuracy_matrix


def test_the_run_marker_is_written_before_any_row_is_measured(
    experiment: Callable[..., Experiment], tmp_path: Path, process: Executor
) -> None:
    made = experiment(method="finetune", compute={"device": "cpu", "checkpoint": {"every_steps": 1}})
    asked = iter([False] * 3 + [True] * 1000)
    with pytest.raises(StoppedError):
        run_sequence(
            made, tmp_path / "run", device=torch.device("cpu"), stop_requested=lambda: next(asked),
            submit_evaluation=elsewhere(made, tmp_path / "run", process, pause=2.0),
        )  # fmt: skip
    assert (tmp_path / "run/checkpoint.pt").is_file()
    assert not (tmp_path / "run/zero_shot.json").is_file()
    with refused(ErrorCode.OTHER_RUN):
        run_sequence(experiment(method="finetune", seed=1), tmp_path / "run", device=torch.device("cpu"))


def test_a_folder_without_results_may_be_reused(experiment: Make, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run_sequence(experiment(), tmp_path, device=CPU, stop_requested=lambda: True)
    assert [file.name for file in tmp_path.glob("*.json")] == ["zero_shot.part.json"]
    found = run_sequence(experiment(seed=1), tmp_path, device=CPU)
    assert (found.seed, (tmp_path / "zero_shot.part.json").exists()) == (1, False)


def test_a_failed_asynchronous_evaluation_ends_the_run(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    def fail(stage: int) -> None:
        raise InputError(f"stage {stage}: found nothing, expected something", code=ErrorCode.EMPTY)

    with ThreadPoolExecutor(1) as pool, refused(ErrorCode.EMPTY):
        run_sequence(
            experiment(method="finetune"), tmp_path / "run", device=torch.device("cpu"),
            submit_evaluation=lambda stage: pool.submit(fail, stage),
        )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, tasks: list[str]) -> tuple[Experiment, Path, Path]:
    """An experiment, its run without the end, and the finished run of another seed."""
    optimisation = {"steps": 2, "warmup_steps": 0, "batch_size": 4}
    recipe: dict[str, Any] = {
        "name": "tiny", "model": tiny_model, "tasks": tasks[:2], "method": "finetune", "optimisation": optimisation,
    }  # fmt: skip
    made, other = (Experiment.model_validate({**recipe, "seed": seed}) for seed in (1, 2))
    place = tmp_path_factory.mktemp("whole")
    for experiment, name in ((made, "run"), (other, "other")):
        run_sequence(experiment, place / name, device=CPU)
    (place / "run/result.json").unlink()
    return made, place / "run", place / "other"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def changed(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


FIRST = "stages/1-first"
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], ErrorCode, str]] = {
    "a cut row": (lambda run, _: cut(run / FIRST / "accuracy.json"), ErrorCode.UNREADABLE, "EOF"),
    "an empty row": (lambda run, _: (run / "zero_shot.json").write_text(""), ErrorCode.UNREADABLE, "zero_shot.json"),
    "bytes": (lambda run, _: (run / FIRST / "accuracy.json").write_bytes(b"\xff\xfe"), ErrorCode.UNREADABLE, "damaged"),
    "JSON of another kind": (
        lambda run, _: (run / FIRST / "accuracy.json").write_text('{"top1": 1}'), ErrorCode.UNREADABLE, "top1",
    ),
    "a list": (lambda run, _: (run / FIRST / "training.json").write_text("[]"), ErrorCode.UNREADABLE, "training.json"),
    "an empty outcome": (lambda run, _: (run / FIRST / "training.json").write_text(""), ErrorCode.UNREADABLE, "EOF"),
    "another run's row": (
        lambda run, other: shutil.copy(other / FIRST / "accuracy.json", run / FIRST), ErrorCode.OTHER_RUN, "the row",
    ),
    "other tasks": (
        lambda run, _: changed(run / FIRST / "accuracy.json", accuracy={"moon": 1.0}, images={"moon": 1}),
        ErrorCode.UNKNOWN_NAME,
        "'moon'",
    ),
    "too few tasks": (
        lambda run, _: changed(run / FIRST / "accuracy.json", accuracy={"first": 1.0}, images={"first": 1}),
        ErrorCode.MISSING_VALUE,
        "'second'",
    ),
    "another stage": (lambda run, _: changed(run / FIRST / "training.json", stage=2), ErrorCode.OTHER_RUN, "stage 2"),
    "another task": (lambda run, _: changed(run / FIRST / "training.json", task="x"), ErrorCode.OTHER_RUN, "task x"),
    "other steps": (lambda run, _: changed(run / FIRST / "training.json", steps=9), ErrorCode.OTHER_RUN, "steps 9"),
    "another run's stage": (
        lambda run, other: (
            shutil.copytree(other / FIRST, run / FIRST, dirs_exist_ok=True), (run / FIRST / "accuracy.json").unlink()
        ),
        ErrorCode.OTHER_RUN,
        "found identity stage-",
    ),
    "no model": (
        lambda run, _: shutil.rmtree(run / FIRST / "model"),
        ErrorCode.NOT_FOUND,
        "open_clip_model.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_foreign_file_is_named_before_a_run_resumes(
    whole: tuple[Experiment, Path, Path], tmp_path: Path, name: str
) -> None:
    made, finished, other = whole
    spoil, code, words = DAMAGE[name]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    opened = resolve(made)
    check_run_folder(opened, run)
    spoil(run, other)
    with refused(code) as error:
        check_run_folder(opened, run)
    assert words in str(error.value)
    if name != "no model":
        with refused(code):
            run_sequence(opened, run, device=CPU)


def test_the_advice_in_error_messages_helps(whole: tuple[Experiment, Path, Path], tmp_path: Path) -> None:
    made, finished, _ = whole
    shutil.copytree(finished, tmp_path / "run")
    rows = [tmp_path / "run" / name for name in ("stages/2-second/accuracy.json", f"{FIRST}/accuracy.json")]
    before = [json.loads(row.read_text())["accuracy"] for row in rows]
    rows[0].unlink()
    shutil.rmtree(rows[1].parent)
    run_sequence(made, tmp_path / "run", device=CPU)
    assert [json.loads(row.read_text())["accuracy"] for row in rows] == before


def test_a_checkpoint_of_another_run_is_refused(whole: tuple[Experiment, Path, Path], tmp_path: Path) -> None:
    made, _, _ = whole
    asked = iter(range(100))
    with pytest.raises(StoppedError):
        run_sequence(made, tmp_path / "run", device=CPU, stop_requested=lambda: next(asked) >= 2)
    assert (tmp_path / "run/checkpoint.pt").is_file()
    other = made.model_copy(update={"seed": 7})
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "run/checkpoint.pt", tmp_path / "other")
    with refused(ErrorCode.OTHER_RUN) as error:
        run_sequence(other, tmp_path / "other", device=CPU)
    assert "checkpoint.pt" in str(error.value)
    run_sequence(made, tmp_path / "run", device=CPU)


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [(["1-a", "3-c"], ErrorCode.NOT_FOUND, "no stage 2"), (["x"], ErrorCode.MISMATCH, "stages/x")],
)
def test_stage_files_are_ordered_by_stage_number(tmp_path: Path, names: list[str], code: ErrorCode, words: str) -> None:
    for name in ("1-a", "10-j", "2-b", *(f"{k}-x" for k in range(3, 10))):
        write_text(tmp_path / "whole/stages" / name / "training.json", "{}")
    found = [file.parent.name for file in stage_files(tmp_path / "whole", "training.json")]
    assert [int(name.partition("-")[0]) for name in found] == list(range(1, 11))
    for name in names:
        write_text(tmp_path / "run/stages" / name / "training.json", "{}")
    with refused(code) as error:
        stage_files(tmp_path / "run", "training.json")
    assert words in str(error.value)
