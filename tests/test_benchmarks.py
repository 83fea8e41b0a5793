"""The benchmarks run and print what they promise; how fast they find us is for people to read."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(benchmark: str, options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / benchmark), *options.split(), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_a_steps_cost_as_rows() -> None:
    found = run("step.py", "--batch 2 --classes 3 5 --captions 8 --rounds 1 --device cpu")
    rows = json.loads(found.stdout)
    assert [(row["classes"], row["captions"]) for row in rows] == [(3, 8), (5, 8)]
    for row in rows:
        for figure in ("over_floor", "over_floor_teacher_online", "faster_than_authors", "share_of_peak"):
            assert row[figure] > 0
    assert found.stderr.count("x floor") == 2


def test_streams_against_their_ceiling() -> None:
    found = json.loads(run("streams.py", "--images 64 --size 48 --pixels 16 --rounds 1").stdout)
    for figure in ("over_ceiling", "remote_over_ceiling", "kept_over_decoded", "memory_growth"):
        assert found[figure] > 0
    assert found["images_per_second"].keys() == {"ceiling", "local", "remote", "kept"}
