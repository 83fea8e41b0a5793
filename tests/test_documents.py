"""Tests that run the commands and recipes of the documents, and check their tables and links."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.command import Command
from support.data import coloured_images
from support.dataset_trees import TREES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {file: file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def blocks(language: str, section: str) -> list[str]:
    """Return the fenced blocks of a language in a section of the documents."""
    [text] = [page.partition(f"# {section}\n")[2] for page in PAGES.values() if f"# {section}\n" in page]
    return re.findall(rf"```{language}\n(.*?)```", re.split(r"\n##? ", text)[0], flags=re.S)


def commands(section: str) -> list[list[str]]:
    lines = "".join(blocks("bash", section)).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("zscl ")]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a user's folder with photos sorted by class and a reference set of image files with captions."""
    monkeypatch.chdir(tmp_path)
    for seed, (task, classes) in enumerate({"animals": ["cat", "dog"], "vehicles": ["car", "bus", "tram"]}.items()):
        for split, count in (("train", 8), ("test", 4)):
            for index, (image, _) in enumerate(coloured_images(count * len(classes), seed)):
                folder = tmp_path / "photos" / task / split / classes[index % len(classes)]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{index}.jpg").write_bytes(image)
    (tmp_path / "reference").mkdir()
    for index, (image, _) in enumerate(coloured_images(20, 9)):
        (tmp_path / "reference" / f"{index}.png").write_bytes(image)
    (tmp_path / "reference/captions.txt").write_text("a red thing\na green thing\nsomething blue\n")
    return tmp_path


def test_own_tasks_from_folders_to_a_comparison(
    own: Path, zscl: Callable[..., Command], ray_cluster: None, without_ray: Callable[[], None]
) -> None:
    [recipe] = blocks("yaml", "Your own tasks")
    (own / "own.yaml").write_text(recipe)
    shown = [*commands("Your own tasks"), *commands("Files of a run"), *commands("The comparison's page")]
    assert [command[0] for command in shown] == ["data", "data", "run", "run", "run", "compare", "sync", "compare"]
    for command in shown:
        found = zscl(*command)
        assert found.code == 0, (command, found.error)
        if "runs/own-zscl" in command:
            without_ray()  # only the first run uses Ray, to save time
    assert {path.name for path in (own / "runs").iterdir()} >= {"own-zscl", "own-finetune", "comparison"}
    assert (own / "runs/own-zscl/result.json").read_text().count('"stage"') == 2
    for command in commands("Evaluating and averaging again"):
        found = zscl(*command)
        assert found.code == 0, (command, found.error)
    assert (own / "runs/own-zscl/evaluation/evaluation.json").is_file()
    assert (own / "runs/own-snapshots/averages/2-vehicles/averages.png").is_file()
    [resume] = commands("When a run is interrupted")
    found = zscl(*resume)
    assert (found.code, "finished before, nothing to do" in found.error) == (0, True)

    [recipe] = blocks("yaml", "Class-incremental learning")
    (own / "own-classes.yaml").write_text(recipe)
    [command] = commands("Class-incremental learning")
    found = zscl(*command)
    assert found.code == 0, found.error
    assert [path.name for path in sorted((own / "runs/own-classes/stages").iterdir())] == [
        "1-classes-1-2", "2-classes-3-3",
    ]  # fmt: skip

    [search] = blocks("yaml", "Search")
    (own / "own-search.yaml").write_text(search)
    dry_run, real = commands("Search")
    assert real[:2] == dry_run[:2]  # test_run.py tests real searches
    found = zscl(*dry_run)
    assert found.code == 0, found.error
    assert yaml.safe_load(found.out)["plan"]["stage_trainings"] == 8

    [_, table] = blocks("yaml", "How a method is put together")
    (own / "own-ablation.yaml").write_text(table)
    [command] = commands("How a method is put together")
    found = zscl(*command)
    assert found.code == 0, found.error
    plans = yaml.safe_load(found.out)["variants"]
    assert [plan["experiment"]["name"] for plan in plans] == [
        f"own-ablation-{name}" for name in yaml.safe_load(table)["variants"]
    ]
    assert plans[1]["experiment"]["method"]["distill"]["text_weight"] == 0.0

    [preset] = blocks("yaml", "A preset")
    (own / "gentle.yaml").write_text(preset)
    found = zscl("run", "gentle.yaml", "--variant", "gentle", "--dry-run")
    assert (found.code, "name: gentle" in found.out) == (0, True), found.error
    [worst] = blocks("python", "A metric")
    exec(compile(worst, "a metric", "exec"), {})
    [script] = blocks("python", "The Python API")
    exec(compile(script, "the Python API", "exec"), {})
    assert (own / "runs/own-api/result.json").is_file()
    [parameters] = blocks("yaml", "A search parameter")
    (own / "own-losses.yaml").write_text(parameters)
    [command] = commands("A search parameter")
    found = zscl(*command)
    assert found.code == 0, found.error


def test_a_task_of_ones_own(own: Path, zscl: Callable[..., Command]) -> None:
    for split in ("train", "test"):
        (own / "scans" / split).mkdir(parents=True)
        for index, (image, _) in enumerate(coloured_images(8, 0)):
            (own / "scans" / split / f"{index % 2}-{index}.png").write_bytes(image)
    [script] = blocks("python", "A task")
    exec(compile(script, "a task", "exec"), {})
    found = zscl("data", "check", "tasks/scans")
    assert "2 classes" in found.out or "left" in found.out, (found.out, found.error)


def test_the_loss_shown_is_that_of_the_example() -> None:
    [shown] = blocks("yaml", "A loss")
    recipe = yaml.safe_load((ROOT / "examples/custom-loss/recipe.yaml").read_text())
    method = {name: part for name, part in recipe["method"].items() if name != "average"}
    assert yaml.safe_load(shown)["method"] == method


SECTIONS_RUN = (
    "Your own tasks", "Files of a run", "Evaluating and averaging again", "When a run is interrupted", "Search",
    "Class-incremental learning", "How a method is put together", "The embedded model", "The tasks of the paper",
    "The comparison's page", "A search parameter",
)  # fmt: skip
SCRIPTS = "".join((ROOT / "tests/cluster" / name).read_text() for name in ("submit.sh", "hosts.sh"))
ELSEWHERE = {  # commands that other tests cover
    "make demo": "test_demo.py",
    "make test": "CI",
    "zscl --version": "test_cli.py",
    "zscl run --help": "test_walls.py",
    "mlflow ui": "test_mlflow_page.py",
    ".venv/bin/mlflow ui": "test_mlflow_page.py",
}


def test_every_command_shown_is_run() -> None:
    run = {line for section in SECTIONS_RUN for block in blocks("bash", section) for line in block.splitlines()}
    for page, text in PAGES.items():
        for line in "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).splitlines():
            known = line in run or line.startswith(tuple(ELSEWHERE))
            words = shlex.split(line, comments=True)
            verb = [word for word in words if not re.match(r"\w+=", word)][:3]
            of_cluster = page.name == "cluster.md" and " ".join(verb[: 2 if verb[0] == "zscl" else 3]) in SCRIPTS
            assert known or of_cluster or not words, (page.name, line)


PINNED = f"typer=={importlib.metadata.version('typer')}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.skipif(not PINNED, reason="another typer prints the commands' page in its own way")
def test_reference_pages_are_what_their_sources_make() -> None:
    subprocess.run([sys.executable, str(ROOT / "docs/reference.py"), "--check"], check=True, cwd=ROOT)


def test_every_page_is_in_the_sites_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "api"]  # linked by modules.md
    for page in pages:
        assert page.relative_to(ROOT / "docs").as_posix() in menu, page


def test_the_embedded_model_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zscl: Callable[..., Command]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.setattr("zscl.datasets.synthetic.suites.CORPUS_PAIRS", 512)  # the complete one takes minutes
    monkeypatch.setattr("zscl.datasets.synthetic.suites.REFERENCE_PAIRS", 64)
    shown = commands("The embedded model")
    assert [command[0] for command in shown] == ["data", "pretrain"]
    for command in shown:
        found = zscl(*command)
        assert found.code == 0, (command, found.error)
    assert "zero-shot digits" in found.out
    assert (tmp_path / "data/embedded-model/open_clip_model.safetensors").is_file()


def test_the_tasks_of_the_paper_in_the_commands_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zscl: Callable[..., Command], unchecked: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for tree in TREES.values():
        tree(tmp_path / "torchvision")
    (tmp_path / "Validation_GCC.tsv").write_text("a dog on a beach\tsomewhere\n")
    cars, all_of_them, captions = commands("The tasks of the paper")
    # Tests must not download data, so the other ten tasks come from a local copy as well.
    for command in (cars, [*all_of_them, "--root", "~/torchvision", "--jobs", "1"], captions):
        found = zscl(*command)
        assert found.code == 0, (command, found.error)
    assert {path.name for path in (tmp_path / "data/mtil").iterdir()} == set(TREES)
    recipe = yaml.safe_load((ROOT / "experiments/mtil-order-1.yaml").read_text())
    for task in recipe["tasks"]:
        assert (tmp_path / (task if isinstance(task, str) else task["path"]) / "zscl.json").is_file()


def test_every_make_target_shown_exists() -> None:
    shown = "".join(PAGES.values())
    targets = set(re.findall(r"^make (\S+)", shown, flags=re.M)) | set(re.findall(r"`make (\S+)`", shown))
    assert targets >= {"demo", "test", "install"}
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M), target


def test_the_method_shown_is_the_preset_itself() -> None:
    from schemas.method import Method

    shown = blocks("yaml", "How a method is put together")[0]
    assert Method.model_validate(yaml.safe_load(shown)["method"]) == Method.model_validate("zscl")


def test_the_table_of_scale_is_what_its_script_prints() -> None:
    printed = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/scale.py")], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() in (ROOT / "docs/scale.md").read_text()
