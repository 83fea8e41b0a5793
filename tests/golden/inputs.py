"""Inputs of the golden runs: a small CLIP, two tasks and a reference set, byte for byte the same on every machine.

Weights and pixels come from NumPy's integer generators, without floating-point functions and without compression.
"""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from schemas.method import PRESETS

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
MODEL: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
OPTIMISATION = {
    "steps": 5, "warmup_steps": 2, "batch_size": 6, "reference_batch_size": 5, "learning_rate": 0.01,
}  # fmt: skip
METHODS: dict[str, Any] = {
    **{preset: {"preset": preset} for preset in PRESETS},
    "icarl": {"preset": "icarl", "memory": {"budget": 12}},
    "lwf-vr": {"preset": "lwf-vr", "distill": {"random_texts": 17, "random_length": 5}},
    "we+wc": {"preset": "we+wc", "average": {"every": 2}},
    "zscl": {"preset": "zscl", "average": {"every": 2}},
    "ema": {"preset": "we", "average": {"every": 1, "kind": "exponential", "decay": 0.7, "start_share": 0.1}},
    "distances": {
        "preset": "zscl", "average": {"every": 2}, "distill": {"similarity_weight": 0.5, "feature_weight": 2.0},
    },
}  # fmt: skip
STOPPED = "zscl"  # the method of the run that is stopped after step 3


def write_inputs(folder: Path) -> None:
    """Write `clip/`, `first/`, `second/` and `reference/` into a folder."""
    _write_model(folder / "clip")
    for seed, name in enumerate(("first", "second")):
        task = folder / name
        for split, count in (("train", 24), ("test", 12)):
            rng = np.random.default_rng([seed, count])
            samples = [(_ppm(rng, index), {"cls": str(index % len(COLOURS)).encode()}) for index in range(count)]
            _write_shards(task / split, samples, 9)
        (task / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
        (task / "zeroshot_classification_templates.txt").write_text(f"a {name} square of {{c}}\nsome {{c}}\n")
    rng = np.random.default_rng(9)
    words = list(COLOURS)
    samples = [(_ppm(rng, index), {"txt": f"a thing of {words[index % 4]}".encode()}) for index in range(14)]
    _write_shards(folder / "reference", samples, 8)


def recipes() -> dict[str, dict[str, Any]]:
    """The recipes of the golden runs, with paths relative to the folder of the inputs."""
    common: dict[str, Any] = {
        "name": "golden",
        "model": "local-dir:clip",
        "tasks": ["first", "second"],
        "reference": "reference",
        "optimisation": OPTIMISATION,
        "compute": {"device": "cpu"},
    }
    found = {name: {**common, "method": method} for name, method in METHODS.items()}
    found["class-incremental"] = {
        **{key: value for key, value in common.items() if key != "tasks"},
        "method": {"preset": "zscl", "average": {"every": 2}, "task_loss": {"earlier_names": True}},
        "optimisation": {**OPTIMISATION, "warmup_steps": 1},
        "class_incremental": {"path": "first", "first": 2, "increment": 2},
    }
    return found


def _write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    state = {}
    for name, weight in open_clip.CLIP(**MODEL).state_dict().items():
        noise = torch.from_numpy(rng.integers(-64, 65, tuple(weight.shape)).astype(np.float32)) / 192
        if name == "logit_scale":
            state[name] = torch.tensor(3.0)
        else:
            is_norm = name.split(".")[-2].startswith("ln_") if "." in name else False
            state[name] = noise + (1.0 if is_norm and name.endswith("weight") else 0.0)
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state, folder / "open_clip_model.safetensors")


def _ppm(rng: np.random.Generator, index: int) -> bytes:
    """A noisy square of one colour, uncompressed; decoders look at the content, not at the name."""
    colour = np.array(list(COLOURS.values())[index % len(COLOURS)])
    pixels = np.clip(colour + rng.integers(-90, 91, (16, 16, 3)), 0, 255).astype(np.uint8)
    return b"P6 16 16 255\n" + pixels.tobytes()


def _write_shards(folder: Path, samples: Iterable[tuple[bytes, dict[str, bytes]]], size: int) -> None:
    folder.mkdir(parents=True)
    numbered = list(enumerate(samples))
    shards = [numbered[start : start + size] for start in range(0, len(numbered), size)]
    for shard, chunk in enumerate(shards):
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, (image, others) in chunk:
                for suffix, content in {"png": image, **others}.items():
                    info = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "nshards.txt").write_text(f"{len(shards)}\n")
