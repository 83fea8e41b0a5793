"""`zscl data check`: tables, JSON, contact sheet and exit code."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from support.command import Command
from support.data import COLOURS, coloured_images, make_task

from orchestrate.analysis.validate_data import BAR_DELAY_SECONDS, delayed_progress_bars
from schemas.dataset_report import DatasetReport
from zscl.datasets.task_writer import write_task

Zscl = Callable[..., Command]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return make_task(tmp_path / "task", seed=0)


def test_a_clean_task_and_its_picture(task: Path, zscl: Zscl, tmp_path: Path) -> None:
    found = zscl("data", "check", task, "--picture", tmp_path / "new/sheet.png")
    assert (found.code, found.error) == (0, "")
    assert found.out.startswith(f"{task}: 4 classes, 2 templates\n")
    assert "shards: 5 complete, sizes and SHA-256 match zscl.json" in found.out
    assert found.out.endswith(f"0 problems, 0 warnings\npicture {tmp_path}/new/sheet.png\n")
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG"
        assert 480 <= sheet.width <= 600  # four images side by side,
        assert 500 <= sheet.height <= 700  # four classes one below the other
        colours = sheet.convert("RGB").quantize(32).convert("RGB").getcolors()
        assert colours is not None
        assert any(red > 180 and green < 80 for _, (red, green, *_) in colours)  # type: ignore[misc]


def test_problems_are_printed_with_exit_code_1(task: Path, zscl: Zscl) -> None:
    (task / "classnames.txt").write_text("[red]\ngreen\n:smile:\n")  # nobody means markup
    found = zscl("data", "check", task)
    assert (found.code, found.error) == (1, "")
    assert "│ train/0.tar │ 0000003 │ label outside the class list │ found '3', expected 0 to 2 │" in found.out
    assert "problem  found 8 samples that cannot be used (label outside the class list: 8), expected none" in found.out
    assert "[red]" in found.out
    assert ":smile:" in found.out


def test_warnings_alone_are_exit_code_0(tmp_path: Path, zscl: Zscl) -> None:
    train = list(coloured_images(8, 0))
    splits = {"train": [*train, train[5]], "test": list(coloured_images(4, 1))}
    write_task(tmp_path / "task", list(COLOURS), ["{c}"], splits, suffix="png", source="made by a test")
    found = zscl("data", "check", tmp_path / "task")
    assert found.code == 0
    assert "│ train/0.tar │ 0000005 │ train/0.tar │ 0000008 │ 1      │" in found.out
    assert "warning  found 1 image repeated within a split" in found.out


def test_json_report(task: Path, zscl: Zscl) -> None:
    (task / "train/2.tar").unlink()
    found = zscl("data", "check", task, "--json")
    assert found.code == 1
    finding = DatasetReport.model_validate_json(found.out)
    assert finding.problems == ("train/2.tar: found no such file, expected a shard listed in nshards.txt",)
    assert json.loads(found.out)["splits"][0]["per_class"] == [5, 5, 4, 4]


def test_a_missing_task_is_exit_code_2(tmp_path: Path, zscl: Zscl) -> None:
    found = zscl("data", "check", tmp_path / "nowhere")
    assert (found.code, found.out) == (2, "")
    assert found.error == f"error: {tmp_path}/nowhere: found no such folder, expected a task folder\n"


def test_many_classes_are_not_all_listed_or_drawn(tmp_path: Path, zscl: Zscl) -> None:
    images = [(image, number % 60) for number, (image, _) in enumerate(coloured_images(240, 0))]
    splits = {"train": images[:120], "test": images[120:]}
    names = [f"number {number}" for number in range(60)]
    write_task(tmp_path / "task", names, ["a photo of ${c}$"], splits, suffix="png", source="made by a test")
    found = zscl("data", "check", tmp_path / "task", "--picture", tmp_path / "sheet.png", "--per-class", 2)
    assert found.code == 0
    assert "Images of the 20 smallest classes (--json: of all 60)" in found.out
    with Image.open(tmp_path / "sheet.png") as sheet:  # 24 classes in three columns of eight
        assert 700 <= sheet.width <= 900
        assert 1100 <= sheet.height <= 1300


def test_only_long_work_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("orchestrate.analysis.validate_data.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with delayed_progress_bars(Console(file=stream, width=120, force_terminal=True)) as progress:
        progress("indexing shards", 0, 2)
        progress("indexing shards", 1, 2)
        assert stream.getvalue() == ""
        progress("checking samples", 10, 1000)
        clock[0] += BAR_DELAY_SECONDS
        progress("checking samples", 500, 1000)
    assert "500/1000" in stream.getvalue()
    assert "indexing" not in stream.getvalue()
