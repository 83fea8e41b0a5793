"""Overhead of Ray: throughput of a stage in a plain process, with Ray Train, and on two workers, and start-up time.

    zscl data prepare embedded --out runs/demo/data
    python benchmarks/workers.py                                # about twelve minutes
    python benchmarks/workers.py --model embedded --steps 60    # 4 million parameters: gradients matter more

Every run trains the first task of the embedded suite with ZSCL at the same global batch, one core per worker, with
the same memory settings and cached teacher features. The default model is the random ViT of benchmarks/step.py with an
image size of 112. Prints medians over rounds: the throughput with Ray Train divided by that of the plain process (one
worker), half the throughput of two workers divided by that of one (the efficiency), and the seconds that a run with Ray
takes in addition to training and evaluation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import open_clip
import torch
from safetensors.torch import save_file
from step import SMALL

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from orchestrate.cluster.connect import MALLOC_SETTINGS  # noqa: E402

THROUGH_RAY = "from orchestrate.cli.main import main; main()"
PLAIN = """
import sys, torch
from pathlib import Path
from orchestrate.recipes.recipe import load_experiment
from zscl.sequence.run import run_sequence
torch.set_num_threads(1)
run_sequence(load_experiment(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]), device=torch.device("cpu"))
"""


def random_model(folder: Path) -> str:
    """Write an open_clip folder with random weights, on which the cost of a step does not depend."""
    torch.manual_seed(0)
    folder.mkdir()
    save_file(open_clip.CLIP(**SMALL).state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": SMALL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def run(options: argparse.Namespace, folder: Path, workers: int) -> tuple[float, float]:
    """Run a stage; 0 workers mean a plain process.

    Returns:
        Images per second, and the seconds in addition to training and evaluation.
    """
    settings = [f"optimisation.steps={options.steps}", f"optimisation.warmup_steps={options.steps // 3}"]
    settings += ["tasks=[runs/demo/data/digits]", f"compute.workers={max(workers, 1)}", "compute.device=cpu"]
    settings += [f"model={options.model}", f"optimisation.batch_size={options.batch}"]
    settings += [f"optimisation.reference_batch_size={options.batch}", *options.set]
    if workers:
        arguments = ["run", options.recipe, "--offline", "--out", folder]
        command = [sys.executable, "-c", THROUGH_RAY, *arguments, *(f"--set={setting}" for setting in settings)]
    else:
        command = [sys.executable, "-c", PLAIN, options.recipe, folder, *settings]
    environment = os.environ | MALLOC_SETTINGS | {"OMP_NUM_THREADS": "1"}  # like the workers that zscl starts
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads((folder / "result.json").read_text())
    [stage] = result["stages"]
    return stage["images_per_second"], seconds - result["train_seconds"] - result["evaluation_seconds"]


def main() -> None:
    """Measure all variants in several rounds, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "experiments/embedded.yaml")
    parser.add_argument("--model", default="small", help="small (112 px, patch 8, width 192), or a name as in a recipe")
    parser.add_argument("--batch", type=int, default=64, help="task images of all workers, and distillation images")
    parser.add_argument("--steps", type=int, default=12, help="steps of the stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=value", help="override a recipe field")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    speeds: dict[int, list[float]] = {0: [], 1: [], 2: []}
    around: dict[int, list[float]] = {0: [], 1: [], 2: []}
    names = {0: "plain process", 1: "Ray Train, 1 worker", 2: "Ray Train, 2 workers"}
    with tempfile.TemporaryDirectory() as place:
        if options.model == "small":
            options.model = random_model(Path(place, "model"))
        run(options, Path(place, "first"), 0)  # fills the cache of teacher features
        for number in range(options.rounds):
            for workers, name in names.items():
                speed, seconds = run(options, Path(place, f"{workers}-{number}"), workers)
                speeds[workers].append(speed)
                around[workers].append(seconds)
                print(f"round {number + 1}, {name}: {speed:.0f} images/s, {seconds:.0f} s around", file=sys.stderr)
    found = {
        "ray_over_plain": median(ray / plain for ray, plain in zip(speeds[1], speeds[0], strict=True)),
        "efficiency_of_two": median(two / one / 2 for two, one in zip(speeds[2], speeds[1], strict=True)),
        "seconds_around": {name: median(around[workers]) for workers, name in names.items()},
        "images_per_second": {name: median(speeds[workers]) for workers, name in names.items()},
    }
    print(
        f"Ray Train over a plain process: {found['ray_over_plain']:.3f}; efficiency of two workers: "
        f"{found['efficiency_of_two']:.2f}",
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
