"""Time of a training step, compared with a lower bound (the floor) and with the authors' implementation.

    python benchmarks/step.py                                      # about three CPU minutes per row, three rows
    python benchmarks/step.py --model ViT-B-16 --batch 64 --device cuda --precision bf16 --captions 13000

Three implementations alternate on the same images, prompts and captions for several rounds. Every ratio is the median
over rounds of the ratio within a round, so that changes of the machine's speed affect all three alike.

- ours: `zscl.training.step.train_step` for ZSCL (distillation, consolidation, AdamW, averaging in every step). It is
  measured with cached teacher features, and with a teacher that encodes the images in every step.
- floor: only the forward and backward pass of the student on the same task images, distillation images and prompts,
  written in plain open_clip with two image passes and prompts cut to the longest one. There are no losses on captions
  and no optimizer.
- authors: the teacher encodes all captions and images in every step, the student has separate passes, prompts and
  captions have the full context length, and consolidation and averaging loop over parameters.

Needs torch, open_clip, webdataset and pydantic. Weights and inputs are random, because they do not
influence the cost of a step.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import open_clip
import torch
import torch.nn.functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from schemas.compute import Compute
from schemas.method import Average, Distill
from zscl.methods.interfaces import Batch, Teacher
from zscl.methods.terms import Classification, Consolidation, Distillation, Objective
from zscl.methods.weight_averaging import build_averager, trained_parameters
from zscl.models.clip import at_least_float32, precision_context
from zscl.models.pruned_forward import PrunedForward
from zscl.training.optim import select_trained_parameters
from zscl.training.step import GlobalBatchForward, train_step

SMALL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 112, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
TEMPERATURE, SMOOTHING, LEARNING_RATE = 2.0, 0.2, 1e-5
START, END = 49406, 49407


@dataclass
class Inputs:
    """Inputs of a step, which are the same for all implementations."""

    images: torch.Tensor
    labels: torch.Tensor
    references: torch.Tensor
    prompts: torch.Tensor
    captions: torch.Tensor


def texts(count: int, template: int, shortest: int, longest: int, context: int) -> torch.Tensor:
    """Return random token ids [count, context]: start, shared template, `shortest` to `longest` random tokens, end."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.zeros(count, context, dtype=torch.long)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    tokens[:, 0] = START
    tokens[:, 1 : 1 + template] = torch.arange(320, 320 + template)
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[1 + template : 1 + template + length] = torch.randint(1000, START, (length,), generator=generator)
        row[1 + template + length] = END
    return tokens


def build(name: str) -> Any:
    """Build a model with random weights."""
    torch.manual_seed(0)
    if name == "small":
        return open_clip.CLIP(**SMALL, output_dict=True)  # type: ignore[arg-type]
    return open_clip.create_model(name, output_dict=True)


def ours(model: Any, inputs: Inputs, options: argparse.Namespace, online: bool) -> Callable[[], None]:
    """Build the step of zscl, with averaging."""
    model = deepcopy(model).train()
    initial = deepcopy(model).eval().requires_grad_(False)
    select_trained_parameters(model, "model")
    with torch.no_grad(), precision_context(options.precision, inputs.images.device):
        stored = at_least_float32(initial.encode_image(inputs.references, normalize=True))
        embedded = torch.cat([initial.encode_text(part, normalize=True) for part in inputs.captions.split(256)])

    def image_features(images: torch.Tensor, identities: torch.Tensor) -> torch.Tensor:
        if not online:
            return stored
        with torch.no_grad(), precision_context(options.precision, images.device):
            return at_least_float32(initial.encode_image(images, normalize=True))

    compute = Compute(compile=options.compile)
    towers = PrunedForward(model, inputs.prompts, range(len(inputs.prompts)), compute, unused_embeddings_constant=True)
    trained = trained_parameters(model)
    start = [parameter.detach().clone() for parameter in trained]
    batch_size = len(inputs.images)
    distillation = Distillation(
        Teacher(None, at_least_float32(embedded), image_features),  # type: ignore[arg-type]
        len(inputs.references),
        Distill(),
    )
    losses_of = Objective([Classification(batch_size, SMOOTHING), distillation, Consolidation(trained, start, 1.0)])
    student = GlobalBatchForward(
        towers, len(inputs.prompts), model.logit_scale.detach().exp(), batch_size, len(inputs.references),
        options.precision,
    )  # fmt: skip
    optimizer = AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    ensemble = build_averager(Average(every=1), model)
    batch = Batch(inputs.images, inputs.labels, inputs.references, torch.zeros(len(inputs.references), 2))

    def step() -> None:
        train_step(student, losses_of, optimizer, schedule, batch)
        ensemble.after_step(0)

    return step


def floor(model: Any, inputs: Inputs, options: argparse.Namespace) -> Callable[[], None]:
    """Build the lower bound: the student's forward and backward pass in plain open_clip."""
    model = deepcopy(model).train()
    select_trained_parameters(model, "model")
    longest = int(inputs.prompts.argmax(dim=1).max()) + 1
    model.positional_embedding = torch.nn.Parameter(model.positional_embedding[:longest].detach().clone())
    model.attn_mask = model.attn_mask[:longest, :longest]
    prompts = inputs.prompts[:, :longest]

    def step() -> None:
        with precision_context(options.precision, inputs.images.device):
            features = [
                model.encode_image(inputs.images, normalize=True),
                model.encode_image(inputs.references, normalize=True),
                model.encode_text(prompts, normalize=True),
            ]
        sum(feature.float().sum() for feature in features).backward()
        model.zero_grad()

    return step


def authors(model: Any, inputs: Inputs, options: argparse.Namespace) -> Callable[[], None]:
    """Build a step as in the authors' published code."""
    model = deepcopy(model).train()
    initial = deepcopy(model).eval().requires_grad_(False)
    anchor, average = deepcopy(initial), deepcopy(initial)
    select_trained_parameters(model, "model")
    optimizer = AdamW(trained_parameters(model), lr=LEARNING_RATE, weight_decay=0.0)
    scale = model.logit_scale.detach().exp()
    steps = 0

    def soft(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(ours / TEMPERATURE, (theirs / TEMPERATURE).softmax(dim=1)) * TEMPERATURE**2

    def step() -> None:
        nonlocal steps
        with precision_context(options.precision, inputs.images.device):
            prompts = model.encode_text(inputs.prompts, normalize=True)
            images = model.encode_image(inputs.images, normalize=True)
            with torch.no_grad():
                texts = torch.cat([initial.encode_text(part, normalize=True) for part in inputs.captions.split(256)])
                teacher = initial.encode_image(inputs.references, normalize=True)
            student = model.encode_image(inputs.references, normalize=True)
        ours, theirs = scale * student @ texts.T, scale * teacher @ texts.T
        loss = F.cross_entropy(scale * images @ prompts.T, inputs.labels, label_smoothing=SMOOTHING)
        loss = loss + soft(ours, theirs) + soft(ours.T, theirs.T)
        for parameter, kept in zip(model.parameters(), anchor.parameters(), strict=True):
            loss = loss + (parameter - kept).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, merged in zip(model.parameters(), average.parameters(), strict=True):
                merged.copy_((merged * (steps + 1) + parameter) / (steps + 2))
        steps += 1

    return step


def clock(device: torch.device) -> float:
    """Return wall time on a GPU, or CPU time of this process, which other processes do not influence, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def set_float32_precision(precision: str) -> None:
    """Allow TF32 in float32 matrix products and convolutions if `precision` is `tf32`, and forbid it otherwise."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Return the duration of a step in seconds."""
    started = clock(device)
    step()
    return clock(device) - started


def peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """Return the FLOP/s of a large matrix product as the peak speed of the device."""
    size = size or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    square = torch.randn(size, size, device=device, dtype=dtype)
    square @ square
    return 2 * size**3 / min(timed(lambda: square @ square, device) for _ in range(10))


def make_inputs(classes: int, captions: int, model: Any, options: argparse.Namespace) -> Inputs:
    """Make random images and texts on the device."""
    device, size = torch.device(options.device), open_clip.utils.to_2tuple(model.visual.image_size)
    context = model.context_length
    return Inputs(
        torch.randn(options.batch, 3, *size, device=device),
        torch.randint(classes, (options.batch,), device=device),
        torch.randn(options.batch, 3, *size, device=device),
        texts(classes, 4, 1, 4, context).to(device),
        texts(captions, 0, 6, 20, context).to(device),
    )


def build_and_warm(
    build_step: Callable[[], Callable[[], None]], device: torch.device
) -> tuple[Callable[[], None], float | None]:
    """Build a step and run it once, so that memory, kernels and compilation are ready.

    Returns:
        The step, and its peak GPU memory in MB, including its copies of the model; `None` on a CPU.
    """
    if device.type != "cuda":
        step = build_step()
        step()
        return step, None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = build_step()
    for _ in range(2):
        step()
    return step, (torch.cuda.max_memory_allocated(device) - before) / 1e6


def measure(classes: int, captions: int, model: Any, options: argparse.Namespace, flops_peak: float) -> dict[str, Any]:
    """Measure all implementations in alternation, and return a row of results."""
    device = torch.device(options.device)
    inputs = make_inputs(classes, captions, model, options)
    ways = {
        "ours": lambda: ours(model, inputs, options, online=False),
        "ours_online": lambda: ours(model, inputs, options, online=True),
        "floor": lambda: floor(model, inputs, options),
        "authors": lambda: authors(model, inputs, options),
    }
    built = {name: build_and_warm(way, device) for name, way in ways.items()}
    steps = {name: step for name, (step, _) in built.items()}
    with FlopCounterMode(display=False) as counter:
        steps["ours"]()
    rounds = [{name: timed(step, device) for name, step in steps.items()} for _ in range(options.rounds)]
    seconds = {name: median(each[name] for each in rounds) for name in steps}
    rate = counter.get_total_flops() / seconds["ours"]
    return {
        "model": options.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": options.precision,
        "batch": options.batch,
        "classes": classes,
        "captions": captions,
        "rounds": options.rounds,
        "over_floor": median(each["ours"] / each["floor"] for each in rounds),
        "over_floor_teacher_online": median(each["ours_online"] / each["floor"] for each in rounds),
        "faster_than_authors": median(each["authors"] / each["ours"] for each in rounds),
        "seconds": seconds,
        "images_per_second": {name: 2 * options.batch / each for name, each in seconds.items()},
        "peak_megabytes": {name: megabytes for name, (_, megabytes) in built.items()},
        "compile": options.compile,
        "teraflops_per_second": rate / 1e12,
        "share_of_peak": rate / flops_peak,
    }


def main() -> None:
    """Measure every combination of classes and captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small (112 px, patch 8, width 192), or an open_clip name")
    parser.add_argument("--batch", type=int, default=32, help="number of task images, and of distillation images")
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 397])
    parser.add_argument("--captions", type=int, nargs="+", default=[1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="use torch.compile for the image tower of zscl")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_float32_precision(options.precision)
    model = build(options.model).to(options.device)
    flops_peak = peak(torch.device(options.device), options.precision)
    rows = []
    for captions in options.captions:
        for classes in options.classes:
            row = measure(classes, captions, model, options, flops_peak)
            rows.append(row)
            print(
                f"{row['model']} on {row['device']} in {row['precision']}, {options.batch} + {options.batch} images, "
                f"{classes} classes, {captions} captions: {row['over_floor']:.2f} x floor "
                f"({row['over_floor_teacher_online']:.2f} with the teacher's images online), "
                f"{row['faster_than_authors']:.1f} x faster than the authors' way; "
                f"{row['teraflops_per_second']:.3f} TFLOP/s, {100 * row['share_of_peak']:.0f} % of a matrix product",
                file=sys.stderr,
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
