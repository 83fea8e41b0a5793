"""Cost of checkpoints within a stage: written in the background, and written while training waits.

    python benchmarks/checkpoint.py                                # half a minute
    python benchmarks/checkpoint.py --model ViT-B-16 --device cuda --every 50

Three variants of the same steps alternate for several rounds: without checkpoints; with a checkpoint every few steps,
written in the background as in a run; and with checkpoints for which training waits. Every ratio is the median over
rounds of a variant's time divided by the time without checkpoints. Weights and inputs are random. Needs torch,
open_clip, webdataset and pydantic.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import open_clip
import torch
from torch.optim import AdamW

from schemas.compute import Checkpoint
from zscl.methods.weight_averaging import trained_parameters
from zscl.sequence.layout import CHECKPOINT
from zscl.training.checkpoint import CheckpointWriter, State

SMALL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 112, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
WAYS = ("none", "beside", "waited")
NEVER = Checkpoint(every_minutes=1e6)


def steps(model: Any, images: torch.Tensor, options: argparse.Namespace, way: str, folder: Path) -> float:
    """Train with one of the variants, and return the duration in seconds."""
    trained = trained_parameters(model)
    optimizer = AdamW(trained, lr=1e-6, fused=True)
    settings = NEVER if way == "none" else Checkpoint(every_minutes=1e6, every_steps=options.every)
    checkpoints = CheckpointWriter(folder / CHECKPOINT, settings, lambda said: None, lambda: False)

    def state() -> State:
        return {"stage": 1, "step": 0, "model": model.state_dict(), "optimizer": optimizer.state_dict()}

    started = time.perf_counter()
    for step in range(options.steps):
        optimizer.zero_grad()
        model.encode_image(images, normalize=True).sum().backward()
        optimizer.step()
        if step + 1 == checkpoints.next_poll_step:
            checkpoints.maybe_save(step + 1, state)
            if way == "waited":
                checkpoints.wait()
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    checkpoints.wait()
    return seconds


def main() -> None:
    """Measure the variants, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="open_clip name, or small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = open_clip.CLIP(**SMALL) if options.model == "small" else open_clip.create_model(options.model)  # type: ignore[arg-type]
    model = model.to(options.device).train()
    images = torch.randn(options.batch, 3, *open_clip.utils.to_2tuple(model.visual.image_size), device=options.device)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds + 1):  # the first one warms up
            rounds.append(
                {way: steps(model, images, options, way, Path(folder)) for way in ("none", "beside", "waited")}
            )
        megabytes = (Path(folder) / CHECKPOINT).stat().st_size / 1e6
    found = {
        "model": options.model,
        "device": options.device,
        "megabytes": megabytes,
        "seconds_a_step": median(each["none"] for each in rounds[1:]) / options.steps,
        "beside_over_none": median(each["beside"] / each["none"] for each in rounds[1:]),
        "waited_over_none": median(each["waited"] / each["none"] for each in rounds[1:]),
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['model']} on {found['device']}: {1000 * found['seconds_a_step']:.0f} ms a step, checkpoints of "
          f"{megabytes:.0f} MB every {options.every} steps")  # fmt: skip
    print(
        f"written beside the training {found['beside_over_none']:.2f} x, waited for {found['waited_over_none']:.2f} x"
    )


if __name__ == "__main__":
    main()
