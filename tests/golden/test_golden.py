"""What the code computes and shows is what was recorded: see `record.py`."""

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import inputs, record

from schemas.experiment import Experiment
from zscl.sequence.run import run_sequence

HERE = Path(__file__).parent
CPU = torch.device("cpu")
GOLDEN: dict[str, Any] = json.loads((HERE / record.RUNS).read_text())
PINNED = f"typer=={version('typer')}\n" in (record.ROOT / "constraints.txt").read_text()
# Results are bit-identical on the machine of the record; elsewhere, float arithmetic differs by round-off.
IS_SAME_MACHINE = GOLDEN["machine"] == record.machine()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the inputs, with the runs of one process in `runs/`."""
    folder = tmp_path_factory.mktemp("golden")
    inputs.write_inputs(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record.run_all(folder)
    yield folder
    torch.set_num_threads(threads)


def compare(found: dict[str, Any], expected: dict[str, Any], exact: bool) -> None:
    """Compare two summaries, bit for bit or to the tolerance of another order of summation."""
    assert found["files"] == expected["files"]
    assert found["fingerprint"] == expected["fingerprint"]
    if exact:
        assert found == expected
        return
    assert found["accuracy_matrix"] == [pytest.approx(row, abs=0.2) for row in expected["accuracy_matrix"]]
    for ours, theirs in zip(found["losses"], expected["losses"], strict=True):
        for step, golden in zip(ours, theirs, strict=True):
            assert step.keys() == golden.keys()
            for name, value in golden.items():
                # Consolidation also sums the round-off of the attention biases; see below.
                assert step[name] == pytest.approx(value, rel=2e-3 if name == "consolidation" else 5e-4, abs=1e-5), name
    for stage, golden in expected["weights"].items():
        norms = found["weights"][stage]["norms"]
        assert norms.keys() == golden["norms"].keys()
        for name, norm in golden["norms"].items():
            if "in_proj_bias" not in name:  # its key third has a gradient of round-off alone, which Adam scales up
                assert norms[name] == pytest.approx(norm, rel=5e-4, abs=1e-4), name


@pytest.mark.parametrize("name", inputs.recipes())
def test_one_process_computes_what_was_recorded(root: Path, name: str) -> None:
    compare(record.summary(root / "runs" / name), GOLDEN["runs"][name], exact=IS_SAME_MACHINE)


def test_two_workers_compute_what_was_recorded(root: Path, tmp_path: Path) -> None:
    inputs.write_inputs(tmp_path)
    record.run_on_workers(tmp_path, 2)
    for name in inputs.recipes():
        compare(record.summary(tmp_path / "runs" / name), GOLDEN["runs"][name], exact=False)


def test_a_run_that_earlier_code_stopped_resumes_to_the_recorded_numbers(root: Path, tmp_path: Path) -> None:
    shutil.copytree(record.STOPPED_RUN, tmp_path / "run")
    with chdir(root):
        recipe = inputs.recipes()[inputs.STOPPED]
        run_sequence(Experiment.model_validate(recipe), tmp_path / "run", device=CPU)
    journal = (tmp_path / "run" / "journal.jsonl").read_text()
    assert journal.startswith((record.STOPPED_RUN / "journal.jsonl").read_text())
    added = journal.removeprefix((record.STOPPED_RUN / "journal.jsonl").read_text()).splitlines()
    progress = [json.loads(line)["progress"] for line in added if line]
    steps = [[row["step"] for row in event["steps"]] for event in progress if event["event"] == "steps_taken"]
    assert steps[0] == [0, 1, 2]  # of the checkpoint: written once more, all at once
    assert steps[1][0] == 3
    compare(record.summary(tmp_path / "run"), GOLDEN["runs"][inputs.STOPPED], exact=IS_SAME_MACHINE)


def test_fingerprints_of_the_shipped_recipes() -> None:
    assert record.fingerprints() == json.loads((HERE / record.FINGERPRINTS).read_text())


@pytest.mark.skipif(not PINNED, reason="another version of typer prints help differently")
def test_help_of_every_command() -> None:
    texts = record.help_texts()
    assert texts == (HERE / record.HELP).read_text()
    for command in record.COMMANDS:
        if command not in ("", "data"):
            assert f"Example: zscl {command}" in texts


def test_wording_of_the_error_messages() -> None:
    """Other tests assert codes and fields of errors; the wording is pinned here alone."""
    messages = record.messages()
    assert messages == (HERE / record.MESSAGES).read_text(), "run: python tests/golden/record.py --texts"
    assert ": no code: " not in messages


def test_schema_of_the_recipe() -> None:
    assert record.schema() == (HERE / record.SCHEMA).read_text()
