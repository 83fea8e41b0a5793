"""What a sequence costs on so many GPUs, counted: nothing is measured here, and `docs/scale.md` says what it rests on.

    python benchmarks/scale.py

Prints the table of docs/scale.md: MTIL, eleven stages of 1 000 steps of 64 task and 64 reference images, the teacher's
features stored, all rows of the matrix measured.
"""

from dataclasses import dataclass

# FLOP a second that such models get out of an H100 SXM (its data sheet's 67 and 989 TFLOP/s by 0.7 and 0.4), with 16
# images or more on it at once; below, it falls with them. float32 is meant: torch's default, without TF32.
SPEED = {"fp32": 67e12 * 0.7, "bf16": 989e12 * 0.4}
FULL = 16
NVLINK, NETWORK = (
    350e9,
    40e9,
)  # bytes a second that an all-reduce gets out of a node's links, and of 400 Gb/s between nodes
GPUS_A_NODE, CORES_A_GPU = 8, 16
LATENCY = 100e-6  # seconds of a step's six gathers together, among nodes
DECODE = 6.5e-3  # core-seconds to decode, crop and resize an image of about 0.2 megapixels (measured on a CPU)
STAGES, STEPS, IMAGES = 11, 1_000, 128
TEST_IMAGES = 97_210  # of the eleven tasks


@dataclass(frozen=True)
class Model:
    """FLOP of an image's forward pass, and parameters in training."""

    name: str
    flop: float
    parameters: float


MODELS = (Model("ViT-B/16", 35e9, 124e6), Model("ViT-L/14", 162e9, 390e6))


def step_seconds(model: Model, gpus: int, precision: str) -> dict[str, float]:
    """Parts of a step: forward and backward pass, gradients over the network, gathers; and the decoding beside them."""
    own = IMAGES / gpus
    speed = SPEED[precision] * min(1.0, own / FULL)
    inside, nodes = min(gpus, GPUS_A_NODE), -(-gpus // GPUS_A_NODE)
    gradients = 2 * 4 * model.parameters * ((inside - 1) / inside / NVLINK + (nodes - 1) / nodes / NETWORK)
    return {
        "student": 3 * model.flop * own / speed,
        "gradients": gradients,
        "gathers": LATENCY if gpus > 1 else 0.0,
        "decoding": own * DECODE / CORES_A_GPU,
    }


def hours(model: Model, gpus: int, precision: str) -> dict[str, float]:
    """Training, and evaluation of twelve rows, in hours; both bound by their slower half, arithmetic or decoding."""
    parts = step_seconds(model, gpus, precision)
    training = STAGES * STEPS * max(parts["student"] + parts["gradients"] + parts["gathers"], parts["decoding"])
    images = (STAGES + 1) * TEST_IMAGES / gpus
    evaluation = images * max(model.flop / SPEED[precision], DECODE / CORES_A_GPU)
    return {"training": training / 3600, "evaluation": evaluation / 3600}


def table() -> str:
    """The table, as Markdown."""
    head = ["model", "precision", "GPUs", "step, ms", "of it student", "training, min", "evaluation, min", "GPU hours"]
    rows = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 6]
    for model in MODELS:
        for precision in SPEED:
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
