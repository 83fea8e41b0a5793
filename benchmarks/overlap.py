"""Wall time of a sequence whose rows are measured between its stages, against one with rows measured beside them.

    zscl data prepare embedded --out runs/demo/data
    python benchmarks/overlap.py
    python benchmarks/overlap.py --steps 20 --rounds 1 --json

Both are runs of the embedded suite by `zscl run` with one worker, one behind the other on the same machine, which must
have two cores (or GPUs) free: `compute.evaluation` is `inline` in one and `overlapped` in the other. Prints the ratio
of their wall times from the first to the last entry of the journal, without the start of Ray, and sees that the
matrices are the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
ZSCL = [sys.executable, "-c", "from orchestrate.cli import main; main()"]


def run(options: argparse.Namespace, folder: Path, evaluation: str) -> tuple[float, Any]:
    """Seconds of a run, and its matrix."""
    settings = [f"optimisation.steps={options.steps}", f"optimisation.warmup_steps={options.steps // 3}"]
    settings += [f"compute.evaluation={evaluation}", *options.set]
    command = [*ZSCL, "run", options.recipe, "--offline", "--out", folder]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    times = [json.loads(line)["time"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    return (times[-1] - times[0]) / 1000, json.loads((folder / "result.json").read_text())["accuracy_matrix"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "experiments/embedded.yaml")
    parser.add_argument("--steps", type=int, default=30, help="of a stage")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=value", help="of the recipe; repeatable")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"inline": [], "overlapped": []}
    matrices = []
    with tempfile.TemporaryDirectory() as place:
        # The teacher's features are there for every run that counts.
        run(options, Path(place, "first"), "inline")
        for number in range(options.rounds):
            for evaluation in seconds:
                taken, matrix = run(options, Path(place, f"{evaluation}-{number}"), evaluation)
                seconds[evaluation].append(taken)
                matrices.append(matrix)
                print(f"round {number + 1}, {evaluation}: {taken:.0f} s", file=sys.stderr)
    if any(matrix != matrices[0] for matrix in matrices):
        sys.exit("the matrices differ")
    ratio = median(inline / beside for inline, beside in zip(*seconds.values(), strict=True))
    print(f"inline over overlapped: {ratio:.2f} x", file=sys.stderr)
    if options.json:
        print(json.dumps({"steps": options.steps, "seconds": seconds, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
