"""Wall time of a search, compared with the same runs one after another without shared work.

    zscl data prepare embedded --out runs/demo/data
    python benchmarks/search.py
    python benchmarks/search.py --steps 20 --json

First, `zscl run` trains six runs on the embedded suite without cached features, and evaluates them on held-out images.
Then `zscl search` runs the same six settings as trials on the same machine. Trials share the teacher's features, the
zero-shot row and processes; those that differ only in the averaging interval also share the first stage. The search
also evaluates the chosen trial on the test images. Prints the ratio of the two wall times.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
ZSCL = [sys.executable, "-c", "from orchestrate.cli.main import main; main()"]
WEIGHTS, INTERVALS = (0.5, 2.0), (5, 10, 20)
WEIGHT, INTERVAL = "method.distill.image_weight", "method.average.every"
SHARE = 0.2


def timed(*arguments: object) -> float:
    """Run a command line, and return its duration in seconds."""
    started = time.perf_counter()
    done = subprocess.run([*ZSCL, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"zscl {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - started


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both wall times, and return them with the search's counts of stage trainings."""
    steps = [f"optimisation.steps={options.steps}", f"optimisation.warmup_steps={options.steps // 3}"]
    settings = [part for setting in (*steps, *options.set) for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as place:
        singly = []
        for number, (weight, interval) in enumerate(product(WEIGHTS, INTERVALS)):
            values = ["--set", f"{WEIGHT}={weight}", "--set", f"{INTERVAL}={interval}"]
            judged = ["--set", f"evaluation.held_out.share={SHARE}", "--set", "evaluation.held_out.seed=0"]
            out = Path(place, str(number), "run")
            singly.append(timed("run", options.recipe, "--out", out, "--offline", *settings, *values, *judged))
            print(f"run {number + 1} of 6: {singly[-1]:.0f} s", file=sys.stderr)
        search = {
            "domains": {WEIGHT: {"choice": list(WEIGHTS)}, INTERVAL: {"choice": list(INTERVALS)}},
            "sampler": "grid",
            "objectives": ["transfer", "last"],
            "validation_share": SHARE,
        }
        content = {"base": str(options.recipe.absolute()), "search": search}
        YAML(typ="safe").dump(content, Path(place, "search.yaml"))
        folder = Path(place, "search")
        together = timed("search", Path(place, "search.yaml"), "--out", folder, "--offline", *settings)
        found = json.loads((folder / "search.json").read_text())
    return {
        "steps": options.steps,
        "one_after_the_other_seconds": sum(singly),
        "search_seconds": together,
        "ratio": sum(singly) / together,
        "stage_trainings": found["stage_trainings"],
    }


def main() -> None:
    """Measure the runs and the search, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "experiments/embedded.yaml")
    parser.add_argument("--steps", type=int, default=60, help="steps per stage")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b.c=value", help="override a field of the recipe; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    found = measure(options)
    counted = found["stage_trainings"]
    print(
        f"six runs one after the other: {found['one_after_the_other_seconds']:.0f} s; as a search: "
        f"{found['search_seconds']:.0f} s ({counted['run']} of {counted['asked']} stage trainings run); "
        f"{found['ratio']:.2f} x less",
        file=sys.stderr,
    )
    if options.json:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
