"""Wall time of a sequence with evaluation between the stages, compared with evaluation during the next stage.

    python benchmarks/overlap.py
    python benchmarks/overlap.py --steps 10 --test-images 50 --rounds 1 --json

`zscl run` trains the embedded model on six generated tasks with one worker, twice on the same machine, which needs
two free cores or GPUs. `compute.evaluation` is `inline` in the first run and `overlapped` in the second one. As with
MTIL, evaluating all tasks takes about as long as training on one. Prints the ratio of the wall times and checks that
the accuracy matrices are equal. Wall times are measured from the first to the last entry of the journal, so they do not
include the start of Ray.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from zscl.datasets.task_writer import write_task

TASKS, CLASSES, PIXELS, TRAINING_IMAGES = 6, 10, 64, 200
ZSCL = [sys.executable, "-c", "from orchestrate.cli.main import main; main()"]


def images(count: int, seed: int) -> Iterator[tuple[bytes, int]]:
    """Yield JPEGs of noise with alternating labels."""
    draw = np.random.default_rng(seed)
    for index in range(count):
        encoded = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)).save(encoded, "JPEG")
        yield encoded.getvalue(), index % CLASSES


def recipe(options: argparse.Namespace, place: Path) -> Path:
    """Write the tasks and a recipe, and return the recipe's file."""
    names = [f"class {index}" for index in range(CLASSES)]
    for number in range(TASKS):
        splits = {
            "train": images(TRAINING_IMAGES, 2 * number),
            "test": images(options.test_images, 2 * number + 1),
        }
        write_task(place / str(number), names, ["a photo of a {c}"], splits, suffix="jpg", source="made")
    content = {
        "model": "embedded",
        "tasks": [str(place / str(number)) for number in range(TASKS)],
        "method": "finetune",
        "optimisation": {"steps": options.steps, "warmup_steps": options.steps // 3, "batch_size": 64},
    }
    YAML(typ="safe").dump(content, place / "recipe.yaml")
    return place / "recipe.yaml"


def run(file: Path, folder: Path, evaluation: str) -> tuple[float, Any]:
    """Run the recipe, and return the duration in seconds and the accuracy matrix."""
    command = [*ZSCL, "run", file, "--offline", "--out", folder, "--set", f"compute.evaluation={evaluation}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    times = [json.loads(line)["time"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    return (times[-1] - times[0]) / 1000, json.loads((folder / "result.json").read_text())["accuracy_matrix"]


def main() -> None:
    """Measure both runs in several rounds, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps per stage")
    parser.add_argument("--test-images", type=int, default=1500, help="test images per task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"inline": [], "overlapped": []}
    matrices = []
    with tempfile.TemporaryDirectory() as place:
        file = recipe(options, Path(place))
        for number in range(options.rounds):
            for evaluation in seconds:
                taken, matrix = run(file, Path(place, f"{evaluation}-{number}"), evaluation)
                seconds[evaluation].append(taken)
                matrices.append(matrix)
                print(f"round {number + 1}, {evaluation}: {taken:.0f} s", file=sys.stderr)
    if any(matrix != matrices[0] for matrix in matrices):
        sys.exit("the matrices differ")
    ratio = median(inline / beside for inline, beside in zip(*seconds.values(), strict=True))
    print(f"inline over overlapped: {ratio:.2f} x", file=sys.stderr)
    if options.json:
        print(
            json.dumps(
                {"steps": options.steps, "test_images": options.test_images, "seconds": seconds, "ratio": ratio},
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
