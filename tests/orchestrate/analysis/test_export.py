"""`zscl export`: open_clip loads the folder, and the model card has the run's results."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support.command import Command

from orchestrate.recipes import recipe as recipes
from schemas.experiment import Experiment
from zscl.sequence.run import run_sequence

Zscl = Callable[..., Command]


@pytest.fixture
def run(experiment: Callable[..., Experiment], tmp_path: Path) -> Path:
    made = experiment(method={"preset": "zscl", "average": {"every": 2}})
    run_sequence(made, tmp_path / "run", device=torch.device("cpu"))
    recipes.write_experiment(made, tmp_path / "run/experiment.yaml")
    return tmp_path / "run"


def test_a_stage_is_exported_with_its_card(run: Path, zscl: Zscl, tmp_path: Path) -> None:
    found = zscl("export", run, "--stage", 2, "--out", tmp_path / "model")
    assert found.code == 0, found.error
    assert found.out.startswith(f"model   {tmp_path}/model")

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/model")
    trained = load_file(run / "stages/2-second/model/open_clip_model.safetensors")
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())

    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.to_dict()["library_name"] == "open_clip"
    assert "fine-tuned on 2 tasks one after another" in card.text
    assert "(first, second) by **zscl**" in card.text
    assert "The row of this model is **2-second**" in card.text
    assert "- Method: zscl, with average.every=2" in card.text
    assert card.text.count("| 2-second |") == 1
    assert card.text.count("` | own | 10 |") == 3  # a row a task: digest, split family, test images
    assert "Warnings" in card.text  # a tiny model is at chance, and says so
    for picture in ("accuracy_matrix.png", "accuracy_by_stage.png"):
        assert f"({picture})" in card.text
        assert (tmp_path / "model" / picture).is_file()
    assert recipes.load_experiment(tmp_path / "model/experiment.yaml").name == "tiny"


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [("4", "--stage 4: found a run of 3 stages in"), ("0", "expected 1 to 3")],
)
def test_a_missing_stage(run: Path, zscl: Zscl, tmp_path: Path, stage: str, sentence: str) -> None:
    found = zscl("export", run, "--stage", stage, "--out", tmp_path / "model")
    assert (found.code, sentence in found.error) == (2, True)
    assert not (tmp_path / "model").exists()


def test_an_existing_folder_is_not_overwritten(run: Path, zscl: Zscl, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine").write_text("kept")
    found = zscl("export", run, "--out", tmp_path / "model")
    assert found.code == 2
    assert "expected a new or an empty folder" in found.error
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["mine"]


def test_deleted_weights(run: Path, zscl: Zscl, tmp_path: Path) -> None:
    (run / "stages/3-third/model/open_clip_config.json").unlink()
    found = zscl("export", run, "--out", tmp_path / "model")
    assert found.code == 2
    assert "found no model, expected the weights of stage 3" in found.error
