"""Estimate of the cost of a sequence on several GPUs, from speeds measured on one GPU (`docs/gpu.md`).

    python benchmarks/scale.py

Prints the table of docs/scale.md. The sequence is MTIL with eleven stages of 1 000 steps, 64 task images and 64
reference images per step, cached teacher features, and evaluation of all rows of the accuracy matrix.
"""

from dataclasses import dataclass

# FLOP/s, computed from the images per second of ViT-B/16 on an H100 (docs/gpu.md), in training steps with 64 + 64
# images and 100 classes, and in the forward pass of evaluation. Training is
# proportionally slower with fewer than `FULL` images per GPU.
VIT_B_16_FLOP = 35e9  # forward pass of one image
TRAINING_SPEED = {"fp32": 371 * 3 * VIT_B_16_FLOP, "bf16": 1311 * 3 * VIT_B_16_FLOP}
EVALUATION_SPEED = {"fp32": 1275 * VIT_B_16_FLOP, "bf16": 6650 * VIT_B_16_FLOP}
FULL = 16
# Bandwidth of an all-reduce in bytes per second, within a node and over 400 Gb/s between nodes.
NVLINK, NETWORK = 350e9, 40e9
GPUS_A_NODE, CORES_A_GPU = 8, 16
LATENCY = 100e-6  # seconds for the six gathers of a step, between nodes
DECODE = 6.5e-3  # core-seconds to decode, crop and resize an image of about 0.2 megapixels (measured on a CPU)
STAGES, STEPS, IMAGES = 11, 1_000, 128
TEST_IMAGES = 97_210  # test images of the eleven tasks


@dataclass(frozen=True)
class Model:
    """A model with the FLOP of an image's forward pass and the number of trained parameters."""

    name: str
    flop: float
    parameters: float


MODELS = (Model("ViT-B/16", VIT_B_16_FLOP, 124e6), Model("ViT-L/14", 162e9, 390e6))


def step_seconds(model: Model, gpus: int, precision: str) -> dict[str, float]:
    """Estimate the seconds of a step's parts. Decoding runs in parallel with the other parts."""
    own = IMAGES / gpus
    speed = TRAINING_SPEED[precision] * min(1.0, own / FULL)
    inside, nodes = min(gpus, GPUS_A_NODE), -(-gpus // GPUS_A_NODE)
    gradients = 2 * 4 * model.parameters * ((inside - 1) / inside / NVLINK + (nodes - 1) / nodes / NETWORK)
    return {
        "student": 3 * model.flop * own / speed,
        "gradients": gradients,
        "gathers": LATENCY if gpus > 1 else 0.0,
        "decoding": own * DECODE / CORES_A_GPU,
    }


def hours(model: Model, gpus: int, precision: str) -> dict[str, float]:
    """Estimate the hours of training and of evaluating twelve rows. The slower of arithmetic and decoding counts."""
    parts = step_seconds(model, gpus, precision)
    training = STAGES * STEPS * max(parts["student"] + parts["gradients"] + parts["gathers"], parts["decoding"])
    images = (STAGES + 1) * TEST_IMAGES / gpus
    evaluation = images * max(model.flop / EVALUATION_SPEED[precision], DECODE / CORES_A_GPU)
    return {"training": training / 3600, "evaluation": evaluation / 3600}


def table() -> str:
    """Return the table as Markdown."""
    head = ["model", "precision", "GPUs", "step, ms", "of it student", "training, min", "evaluation, min", "GPU hours"]
    rows = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 6]
    for model in MODELS:
        for precision in TRAINING_SPEED:
            rows += [_row(model, precision, gpus) for gpus in (1, 8, 64)]
    return "\n".join(rows)


def _row(model: Model, precision: str, gpus: int) -> str:
    parts, spent = step_seconds(model, gpus, precision), hours(model, gpus, precision)
    step = max(parts["student"] + parts["gradients"] + parts["gathers"], parts["decoding"])
    cells = [
        f"{1000 * step:.0f}",
        f"{100 * parts['student'] / step:.0f} %",
        f"{60 * spent['training']:.1f}",
        f"{60 * spent['evaluation']:.1f}",
        f"{gpus * sum(spent.values()):.1f}",
    ]
    return f"| {model.name} | {precision} | {gpus} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
