"""Record what the code computes and shows, or read it back for comparison.

python tests/golden/record.py --texts    # writes help.txt, schema.json and messages.txt
python tests/golden/record.py            # also runs.json, fingerprints.json and stopped-run/

Run it only to accept an intended change: `test_golden.py` compares every later state of the code with these files.
"""

import argparse
import ast
import csv
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import chdir
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

from golden import inputs  # noqa: E402

from orchestrate.recipes.recipe import load_search  # noqa: E402
from orchestrate.recipes.variants import load_variants  # noqa: E402
from schemas.experiment import Experiment  # noqa: E402
from zscl.sequence.run import run_sequence  # noqa: E402
from zscl.training.checkpoint import StoppedError  # noqa: E402

RUNS, FINGERPRINTS, SCHEMA = "runs.json", "fingerprints.json", "schema.json"
HELP, MESSAGES = "help.txt", "messages.txt"
STOPPED_RUN = HERE / "stopped-run"
COMMANDS = (
    "", "run", "search", "resume", "embed", "sync", "compare", "submit", "evaluate", "average", "export", "schema",
    "pretrain", "demo", "data", "data prepare", "data fetch", "data check",
)  # fmt: skip


def machine() -> dict[str, str]:
    """Everything besides the code on which bit-identical results depend: torch, and the exact kind of CPU."""
    fields, cpuinfo = {}, Path("/proc/cpuinfo")  # of Linux; elsewhere, results are compared to a tolerance
    for line in (cpuinfo.read_text() if cpuinfo.is_file() else "").partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    names = ("model name", "cpu family", "model", "stepping", "microcode", "cache size")
    cpu = {name: fields.get(name, "") for name in names}
    flags = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()[:16]
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "flags": flags, **cpu}


def run_all(root: Path) -> None:
    """Run the golden recipes in `root/runs/<name>`, from the inputs in `root`. Every rank of a group calls this."""
    with chdir(root):
        for name, recipe in inputs.recipes().items():
            run_sequence(Experiment.model_validate(recipe), root / "runs" / name, device=torch.device("cpu"))


def run_on_workers(root: Path, workers: int) -> None:
    """Run the golden recipes in a gloo group of processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(_worker, (workers, port, root), nprocs=workers)  # type: ignore[no-untyped-call]


def _worker(rank: int, workers: int, port: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    run_all(root)
    dist.destroy_process_group()


def summary(run: Path) -> dict[str, Any]:
    """The losses, weights and accuracies of a finished run, with digests, and the names of its files."""
    losses = []
    for file in sorted(run.glob("stages/*/losses.csv")):
        with file.open() as stream:
            losses.append([{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)])
    weights = {}
    for file in sorted(run.glob("stages/*/model/*.safetensors")):
        digest, norms = hashlib.sha256(), {}
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
            norms[name] = float(f"{tensor.double().norm():.7g}")
        weights[file.parent.parent.name] = {"sha256": digest.hexdigest(), "norms": norms}
    result = json.loads((run / "result.json").read_text())
    return {
        "losses": losses,
        "weights": weights,
        "accuracy_matrix": result["accuracy_matrix"],
        "zero_shot": result["zero_shot"],
        "fingerprint": result["fingerprint"],
        "files": sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()),
    }


def fingerprints() -> dict[str, str]:
    """The fingerprint of every recipe in `experiments/`, with the names of locations in place of their digests."""
    found = {}
    for file in sorted((ROOT / "experiments").glob("*.yaml")):
        if file.name.startswith("search-"):
            _, content = load_search(file)
            experiments = {"": Experiment.model_validate(content)}
        elif file.name.startswith("pretrain-"):
            continue
        else:
            experiments = load_variants(file, variant="all" if "variants:" in file.read_text() else None)
        for variant, experiment in experiments.items():
            found[f"{file.name} {variant}".strip()] = experiment.fingerprint(_Names())
    return found


class _Names(defaultdict[str, str]):
    def __missing__(self, location: str) -> str:
        return f"content of {Path(location).relative_to(Path.cwd()) if Path(location).is_absolute() else location}"


def help_texts() -> str:
    """The output of `--help` for every command."""
    environment = os.environ | {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    program = Path(sys.executable).parent / "zscl"
    texts = []
    for command in COMMANDS:
        output = subprocess.run(
            [program, *command.split(), "--help"], capture_output=True, text=True, check=True, env=environment
        ).stdout
        texts.append(f"$ zscl {command} --help".replace("  ", " ") + f"\n{output.rstrip()}\n")
    return "\n".join(texts)


def schema() -> str:
    """The output of `zscl schema`."""
    program = Path(sys.executable).parent / "zscl"
    return subprocess.run([program, "schema"], capture_output=True, text=True, check=True).stdout


def messages() -> str:
    """The wording of every `InputError` that the packages raise, with its code; values are shown as `{}`."""
    lines = []
    for package in ("schemas", "zscl", "orchestrate"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InputError":
                    codes = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                    code = "no code" if not codes else codes[0].attr if isinstance(codes[0], ast.Attribute) else "{}"
                    text = _wording(node.args[0]).replace("\n", "\\n")
                    lines.append(f"{file.relative_to(ROOT)}: {code}: {text}")
    return "\n".join(lines) + "\n"


def _wording(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_wording, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _wording(left) + _wording(right)
        case ast.IfExp(body=body, orelse=orelse):
            return f"({_wording(body)}|{_wording(orelse)})"
        case _:
            return "{}"


def stop_after_three_steps(root: Path) -> Path:
    """Stop a run after step 3 of its first stage; returns its folder."""
    recipe = inputs.recipes()[inputs.STOPPED]
    recipe["compute"] = {**recipe["compute"], "checkpoint": {"every_steps": 1}}
    for moment in count(1):
        folder = root / "stopped"
        shutil.rmtree(folder, ignore_errors=True)
        asked = count(1)
        try:
            run_sequence(
                Experiment.model_validate(recipe),
                folder,
                device=torch.device("cpu"),
                stop_requested=lambda asked=asked, moment=moment: next(asked) == moment,  # type: ignore[misc]
            )
        except StoppedError:
            file = folder / "checkpoint.pt"
            if file.is_file() and torch.load(file, weights_only=True)["step"] == 3:
                return folder
        else:
            break
    raise RuntimeError("the run never stopped after step 3")


def main() -> None:
    """Write the golden files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", action="store_true", help="write the texts only: help, schema and messages")
    if not parser.parse_args().texts:
        write_runs()
    (HERE / HELP).write_text(help_texts())
    (HERE / SCHEMA).write_text(schema())
    (HERE / MESSAGES).write_text(messages())


def write_runs() -> None:
    """Write what is computed: losses, weights, accuracies, fingerprints and the stopped run."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        inputs.write_inputs(root)
        run_all(root)
        runs = {name: summary(root / "runs" / name) for name in inputs.recipes()}
        shutil.rmtree(STOPPED_RUN, ignore_errors=True)
        with chdir(root):
            shutil.copytree(stop_after_three_steps(root), STOPPED_RUN)
    content = {"machine": machine(), "runs": runs}
    (HERE / RUNS).write_text(json.dumps(content, indent=1) + "\n")
    (HERE / FINGERPRINTS).write_text(json.dumps(fingerprints(), indent=1) + "\n")


if __name__ == "__main__":
    main()
