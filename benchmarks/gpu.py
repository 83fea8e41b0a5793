"""Checks of correctness and speed on a GPU, in at most eight minutes.

    python benchmarks/gpu.py                                # all sections on the first GPU, results in gpu.jsonl
    python benchmarks/gpu.py --sections correctness step    # some of them
    python benchmarks/gpu.py --smoke                        # all sections on the CPU with a tiny model, in two minutes
    python benchmarks/gpu.py --table gpu.jsonl              # the results of an earlier run as Markdown tables

Sections, most important first; each runs in its own process with a time limit, and an error in one section does not
stop the next:

- device: card, versions, and the measured peak of a matrix product in fp32, TF32 and bf16;
- correctness: a two-stage ZSCL run on the GPU against the CPU, against itself, against a run that was killed and
  resumed, and in bf16 and TF32 against fp32;
- step: the ZSCL step on ViT-B/16 against the floor and the authors' implementation (see `step.py`);
- data: evaluation with and without JPEG decoding, and training end to end with real decoding;
- profile: the kernels that take the most time in a step, and every host synchronisation of a stage.

Each result is appended to the output file as one JSON line as soon as it is measured, so an interrupted run keeps its
results. Weights and data are random or generated; nothing is downloaded.

Needs torch (2.6 or newer), open_clip, webdataset and pydantic, on Python 3.11 to 3.13; neither Ray nor MLflow.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import open_clip
import step as step_benchmark
import torch
from open_clip import transform
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from schemas.data import Task
from schemas.events import CheckpointWritten, StepsTaken
from schemas.experiment import Experiment, Model
from schemas.results import Result
from zscl.data.loader import Loader
from zscl.data.tar import write_shards
from zscl.data.task import TaskFolder
from zscl.datasets.task_writer import write_task
from zscl.evaluation.zero_shot import compute_accuracies, embed_classes
from zscl.models.clip import Clip, load_clip, precision_context
from zscl.sequence.run import run_sequence

# Maximum differences from the run on the CPU. `losses`: the largest difference in any step, relative to the sum of the
# step's losses. `updates`: norm of the difference between the weight changes of the runs, relative to the norm of the
# weight change. AdamW divides by the root of the squared gradient, so it amplifies round-off of small gradients.
TOLERANCES = {"fp32": {"losses": 1e-4, "updates": 0.02}, "tf32": {"losses": 1e-2}, "bf16": {"losses": 5e-2}}
WEIGHTS = "open_clip_model.safetensors"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}


@dataclass(frozen=True)
class Sizes:
    """Sizes of models and data. The defaults are for a GPU, and `SMOKE` is for the smoke run on a CPU."""

    matrix: int = 8192
    small_model: tuple[int, int, int] = (64, 128, 3)  # image size, width, layers
    stage_steps: int = 20
    stage_batch: int = 16
    step_model: str = "ViT-B-16"
    step_batch: int = 64
    classes: tuple[int, ...] = (100, 397, 10)
    compiled: tuple[str, ...] = ("bf16", "tf32", "fp32")
    captions: int = 13_000
    rounds: int = 3
    images: int = 4_096
    photo: tuple[int, int] = (400, 300)
    processes: tuple[int, ...] = (8, 16, 4)
    training_steps: int = 36
    evaluation_batch: int = 256


SMOKE = Sizes(
    matrix=256,
    small_model=(16, 64, 1),
    stage_steps=4,
    stage_batch=4,
    step_model="tiny",
    step_batch=2,
    classes=(5,),
    compiled=("bf16",),
    captions=8,
    rounds=1,
    images=16,
    photo=(40, 30),
    processes=(1,),
    training_steps=4,
    evaluation_batch=8,
)


class Recorder:
    """Appends results to the output file, as one JSON line per result."""

    def __init__(self, file: Path, section: str) -> None:
        self.file, self.section, self.started = file, section, time.monotonic()

    def __call__(self, kind: str, **values: Any) -> None:
        """Append a result to the file, and print it."""
        seconds = round(time.monotonic() - self.started, 1)
        line = json.dumps({"section": self.section, "kind": kind, **values, "at_seconds": seconds})
        with self.file.open("a") as stream:
            stream.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def errors(self, kind: str, **values: Any) -> Iterator[None]:
        """Context manager: record an exception as a result, so that the section continues with its next check."""
        try:
            yield
        except Exception as error:
            trace = traceback.format_exc().strip().splitlines()[-12:]
            self(f"{kind}_error", **values, error=f"{type(error).__name__}: {error}"[:2_000], trace=trace)
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Context:
    """Device, sizes, recorder and folder of a section."""

    device: torch.device
    sizes: Sizes
    record: Recorder
    folder: Path  # a temporary folder of the section


# Section 1: the device


def measure_device(context: Context) -> None:
    """Record the GPU, the versions, and the speed of a matrix product in each precision."""
    device, cuda = context.device, context.device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    context.record(
        "facts",
        card=torch.cuda.get_device_name(device) if cuda else "CPU",
        memory_gigabytes=properties.total_memory / 1e9 if properties else None,
        capability=f"{properties.major}.{properties.minor}" if properties else None,
        cpu_cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        open_clip=open_clip.__version__,
        matmul_tf32_by_default=torch.backends.cuda.matmul.allow_tf32,
        convolution_tf32_by_default=torch.backends.cudnn.allow_tf32,
    )
    size = context.sizes.matrix
    for precision in ("fp32", "tf32", "bf16"):
        with context.record.errors("matrix_product", precision=precision):
            step_benchmark.set_float32_precision(precision)
            peak = step_benchmark.peak(device, precision, size)
            context.record("matrix_product", precision=precision, size=size, teraflops_per_second=peak / 1e12)


# Section 2: correctness


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """Encode an image [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def coloured_squares(count: int, seed: int, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield encoded images of noisy squares with alternating colours, with their labels."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        colour = list(COLOURS.values())[index % len(COLOURS)]
        pixels = np.clip(np.array(colour) + rng.normal(0, 40, (size, size, 3)), 0, 255).astype(np.uint8)
        yield encode(pixels, "PNG"), index % len(COLOURS)


def write_small_model(folder: Path, sizes: Sizes) -> str:
    """Write a small CLIP with random weights as an open_clip folder, and return its `local-dir:` name."""
    size, width, layers = sizes.small_model
    config = {
        "embed_dim": width,
        "vision_cfg": {"image_size": size, "patch_size": 8, "width": width, "layers": layers, "head_width": 32},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 32, "layers": layers
        },
    }  # fmt: skip
    return write_model(folder, open_clip.CLIP(**config), config)  # type: ignore[arg-type]


def write_model(folder: Path, model: torch.nn.Module, config: Mapping[str, Any]) -> str:
    """Write a model as an open_clip folder, and return its `local-dir:` name."""
    folder.mkdir()
    preprocess = {"mean": transform.OPENAI_DATASET_MEAN, "std": transform.OPENAI_DATASET_STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    return f"local-dir:{folder}"


def write_small_recipe(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Write the model, two tasks and a reference set, and return the recipe of a two-stage ZSCL run."""
    torch.manual_seed(0)
    size = sizes.small_model[0]
    for seed, name in enumerate(("first", "second")):
        splits = {"train": coloured_squares(48, seed, size), "test": coloured_squares(16, seed + 10, size)}
        templates = [f"a {name} photo of a {{c}} square."]
        write_task(folder / name, list(COLOURS), templates, splits, source="random", suffix="png")
    words = list(COLOURS)
    captions = (
        {"png": image, "txt": f"a {words[label]} thing, number {index}".encode()}
        for index, (image, label) in enumerate(coloured_squares(48, 20, size))
    )
    write_shards(folder / "reference", captions, 24)
    steps = sizes.stage_steps
    return {
        "name": "gpu-check",
        "model": write_small_model(folder / "model", sizes),
        "tasks": [str(folder / "first"), str(folder / "second")],
        "reference": str(folder / "reference"),
        "method": {"preset": "zscl", "average": {"every": max(1, steps // 4)}},
        "optimisation": {
            "steps": steps,
            "warmup_steps": steps // 4,
            "batch_size": sizes.stage_batch,
            "reference_batch_size": sizes.stage_batch,
            "learning_rate": 1e-3,
        },
        "compute": {"max_broken_share": 0.0},
    }


class Run(NamedTuple):
    """Results of a run: the losses of every step, the weights after the last stage, and the accuracy matrix."""

    losses: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    matrix: tuple[tuple[float, ...], ...]


def train(
    recipe: dict[str, Any], folder: Path, device: str, precision: str = "fp32", kill_in_stage: int | None = None
) -> Run:
    """Run or resume a recipe in a folder.

    Args:
        recipe: The recipe.
        folder: Parent folder of the run's folder and of its teacher cache. Every run needs another one.
        device: `cpu` or `cuda`.
        precision: `fp32` or `bf16`.
        kill_in_stage: Stage in which this process kills itself, after the first checkpoint in the second half of the
            steps; `None` to complete the run.

    Returns:
        The results of the run.
    """
    optimisation = recipe["optimisation"] | {"precision": precision}
    compute = recipe["compute"] | {"checkpoint": {"every_steps": 1}}
    experiment = Experiment.model_validate(recipe | {"optimisation": optimisation, "compute": compute})

    def on_event(event: BaseModel) -> None:
        if (
            isinstance(event, CheckpointWritten)
            and event.stage == kill_in_stage
            and 2 * event.steps >= optimisation["steps"]
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    result: Result = run_sequence(experiment, folder / "run", on_event, torch.device(device))
    stages = sorted((folder / "run" / "stages").iterdir())
    return Run(
        [losses for stage in stages for losses in read_losses(stage / "losses.csv")],
        load_file(stages[-1] / "model" / WEIGHTS),
        result.accuracy_matrix,
    )


def read_losses(file: Path) -> list[dict[str, float]]:
    """Read the losses of every step of a stage."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    others = ("step", "learning_rate", "gradient_norm")
    return [{name: float(value) for name, value in row.items() if name not in others} for row in rows]


def compare(ours: Run, reference: Run, start: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Compare two runs of one recipe (see `TOLERANCES` for the definition of the differences).

    Biases of attention keys are not compared. Their exact gradient is zero, but AdamW turns round-off into updates.
    """
    losses = max(
        abs(loss - other[name]) / sum(other.values())
        for each, other in zip(ours.losses, reference.losses, strict=True)
        for name, loss in each.items()
    )
    difference = total = 0.0
    for name, weights in reference.weights.items():
        kept = torch.ones(len(weights), dtype=torch.bool) if weights.ndim else torch.ones((), dtype=torch.bool)
        if name.endswith("attn.in_proj_bias"):
            kept[len(weights) // 3 : 2 * len(weights) // 3] = False
        difference += float((ours.weights[name] - weights)[kept].double().square().sum())
        total += float((weights - start[name])[kept].double().square().sum())
    return {
        "losses": losses,
        "updates": (difference / total) ** 0.5,
        "accuracy": max(
            abs(cell - other)
            for row, other_row in zip(ours.matrix, reference.matrix, strict=True)
            for cell, other in zip(row, other_row, strict=True)
        ),
        "identical": ours.losses == reference.losses
        and all(torch.equal(ours.weights[name], weights) for name, weights in reference.weights.items()),
    }


def check_correctness(context: Context) -> None:
    """Compare runs of one recipe: on the GPU and the CPU, repeated, killed and resumed, and in each precision."""
    recipe = write_small_recipe(context.folder, context.sizes)
    start = load_file(context.folder / "model" / WEIGHTS)
    device = context.device.type

    def run(name: str, on: str = device, precision: str = "fp32") -> Run:
        return train(recipe, context.folder / name, on, precision)

    def record(what: str, ours: Run, reference: Run, tolerance: Mapping[str, float] | None) -> None:
        found = compare(ours, reference, start)
        within = found["identical"] if tolerance is None else all(found[key] <= tolerance[key] for key in tolerance)
        context.record("comparison", what=what, **found, tolerance=tolerance or "identical", passed=bool(within))

    cpu = run("cpu", "cpu")
    with context.record.errors("comparison", what="GPU / CPU"):
        gpu = run("gpu")
        record(f"{device} / cpu, fp32", gpu, cpu, TOLERANCES["fp32"])
        record(f"{device} twice", run("again"), gpu, None)
        killed = context.folder / "killed"
        process = multiprocessing.get_context("spawn").Process(target=train, args=(recipe, killed, device, "fp32", 2))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"found exit code {process.exitcode}, expected the kill"
        resumed = train(recipe, killed, device)
        record("killed and resumed / undisturbed", resumed, gpu, None)
        record(f"{device}, bf16 / fp32", run("bf16", precision="bf16"), gpu, TOLERANCES["bf16"])
        torch.backends.cuda.matmul.allow_tf32 = True
        record(f"{device}, TF32 / fp32", run("tf32"), gpu, TOLERANCES["tf32"])
        torch.backends.cuda.matmul.allow_tf32 = False
    # Another number of threads changes only the order of sums. Two devices are expected to differ at least as much.
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    record("cpu, another number of threads", run("threads", "cpu"), cpu, TOLERANCES["fp32"])
    torch.set_num_threads(threads)


# Section 3: the step


def build_step_model(sizes: Sizes) -> Any:
    """Build the model for the measurements of a step, with random weights."""
    if sizes.step_model != "tiny":
        return step_benchmark.build(sizes.step_model)
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32}
    return open_clip.CLIP(32, vision_cfg=vision, text_cfg=text, output_dict=True)  # type: ignore[arg-type]


def step_options(context: Context, precision: str, compiled: bool = False) -> argparse.Namespace:
    """Return the options for functions of `benchmarks/step.py`."""
    sizes = context.sizes
    return argparse.Namespace(
        model=sizes.step_model,
        batch=sizes.step_batch,
        rounds=sizes.rounds,
        device=str(context.device),
        precision=precision,
        compile=compiled,
    )


def measure_step(context: Context) -> None:
    """Measure the ZSCL step for each precision and number of classes, with cached and online teacher, and compiled."""
    sizes = context.sizes
    model = build_step_model(sizes).to(context.device)
    for precision in ("bf16", "tf32", "fp32"):
        with context.record.errors("variants", precision=precision):
            measure_variants(context, model, precision)
    for classes in sizes.classes:
        for precision in ("bf16", "tf32", "fp32"):
            with context.record.errors("step", precision=precision, classes=classes):
                measure_against_others(context, model, precision, classes)


def measure_variants(context: Context, model: Any, precision: str) -> None:
    """Record the relative time of a step with deterministic kernels and with compilation."""
    sizes, device = context.sizes, context.device
    step_benchmark.set_float32_precision(precision)
    inputs = step_benchmark.make_inputs(sizes.classes[0], sizes.captions, model, step_options(context, precision))

    def build(compiled: bool) -> Callable[[], None]:
        options = step_options(context, precision, compiled)
        return step_benchmark.build_and_warm(lambda: step_benchmark.ours(model, inputs, options, False), device)[0]

    def seconds(step: Callable[[], None], deterministic: bool) -> float:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
        step()  # warm up, because the memory blocks of the previous variant have other sizes
        taken = step_benchmark.timed(step, device)
        torch.use_deterministic_algorithms(False)
        return taken

    eager = build(compiled=False)
    pairs = [(seconds(eager, True), seconds(eager, False)) for _ in range(2 * sizes.rounds)]
    images = 2 * sizes.step_batch
    context.record(
        "deterministic",
        precision=precision,
        classes=sizes.classes[0],
        over_default=median(ours / default for ours, default in pairs),
        images_per_second=images / median(ours for ours, _ in pairs),
        images_per_second_default=images / median(default for _, default in pairs),
    )
    if precision not in sizes.compiled:
        return
    started = time.perf_counter()
    compiled = build(compiled=True)
    compiling = time.perf_counter() - started
    pairs = [(seconds(compiled, False), seconds(eager, False)) for _ in range(2 * sizes.rounds)]
    context.record(
        "compiled",
        precision=precision,
        classes=sizes.classes[0],
        over_eager=median(ours / other for ours, other in pairs),
        images_per_second=images / median(ours for ours, _ in pairs),
        seconds_to_compile=compiling,
    )


def measure_against_others(context: Context, model: Any, precision: str, classes: int) -> None:
    """Record the step of zscl relative to the floor and the authors' implementation (see `benchmarks/step.py`)."""
    sizes = context.sizes
    step_benchmark.set_float32_precision(precision)
    peak = step_benchmark.peak(context.device, precision, sizes.matrix)
    found = step_benchmark.measure(classes, sizes.captions, model, step_options(context, precision), peak)
    chosen = ("over_floor", "over_floor_teacher_online", "faster_than_authors", "share_of_peak")
    context.record(
        "step",
        precision=precision,
        classes=classes,
        captions=sizes.captions,
        **{key: found[key] for key in chosen},
        **{f"images_per_second_{way}": speed for way, speed in found["images_per_second"].items()},
        **{f"peak_megabytes_{way}": megabytes for way, megabytes in found["peak_megabytes"].items()},
    )


# Section 4: evaluation, and training end to end


def photographs(count: int, size: tuple[int, int]) -> Iterator[bytes]:
    """Yield JPEGs of smooth noise, which decode like photographs."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        yield encode(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8), "JPEG")


def write_photo_recipe(context: Context) -> dict[str, Any]:
    """Write the model of section 3, a task and a reference set of JPEGs, and return a recipe of one stage."""
    sizes, folder = context.sizes, context.folder
    distinct = list(photographs(min(256, sizes.images), sizes.photo))
    images = [distinct[index % len(distinct)] for index in range(sizes.images)]
    names = [f"class {index}" for index in range(min(100, sizes.images))]
    labelled = [(image, index % len(names)) for index, image in enumerate(images)]
    # The run that measures training has few test images.
    for name, tested in (("photos", labelled[:64]), ("test-photos", labelled)):
        splits = {"train": labelled, "test": tested}
        write_task(folder / name, names, ["a photo of {c}."], splits, source="random", suffix="jpg")
    captions = ({"jpg": image, "txt": f"photo number {index}".encode()} for index, image in enumerate(images))
    write_shards(folder / "reference", captions, 500)
    if sizes.step_model == "tiny":
        name = write_small_model(folder / "model", sizes)
    else:
        torch.manual_seed(0)
        config = open_clip.get_model_config(sizes.step_model)
        name = write_model(folder / "model", open_clip.create_model(sizes.step_model), config)
    return {
        "name": "gpu-data",
        "model": name,
        "tasks": [str(folder / "photos")],
        "reference": str(folder / "reference"),
        "method": "zscl",
        "optimisation": {
            "steps": sizes.training_steps,
            "warmup_steps": 1,
            "batch_size": sizes.step_batch,
            "reference_batch_size": sizes.step_batch,
        },
        "evaluation": {"templates": "first"},
    }


def measure_evaluation(context: Context, clip: Clip, task: TaskFolder) -> None:
    """Record the images per second of evaluation, with images on the device and with JPEG decoding."""
    sizes, device = context.sizes, context.device
    clip.model.eval()
    size = open_clip.utils.to_2tuple(clip.model.visual.image_size)
    pixels = torch.randn(sizes.evaluation_batch, 3, *size, device=device)
    for precision in ("bf16", "tf32", "fp32"):
        step_benchmark.set_float32_precision(precision)
        with torch.inference_mode(), precision_context(precision, device):

            def forward() -> None:
                clip.model.encode_image(pixels, normalize=True)  # type: ignore[operator]

            forward()
            seconds = min(step_benchmark.timed(forward, device) for _ in range(1 + sizes.rounds))
        context.record("evaluation_forward", precision=precision, images_per_second=len(pixels) / seconds)
    [head] = embed_classes(clip, [task], "first", "bf16", device)
    for processes in sizes.processes:
        started = time.perf_counter()
        loader = Loader(device, processes)
        _, images = compute_accuracies(clip, task, [head], loader, precision="bf16", batch_size=sizes.evaluation_batch)
        seconds = time.perf_counter() - started
        context.record("evaluation_jpeg", precision="bf16", processes=processes, images_per_second=images / seconds)


def measure_training(context: Context, recipe: dict[str, Any], processes: int, precision: str) -> None:
    """Record the images per second of a stage, from JPEGs in shards to updated weights, without its first steps."""
    optimisation = recipe["optimisation"] | {"precision": precision}
    compute = {"loader_processes": processes, "decoded_megabytes": 0, "teacher_features": "never"}
    experiment = Experiment.model_validate(recipe | {"optimisation": optimisation, "compute": compute})
    moments: list[tuple[int, float]] = []

    def on_event(event: BaseModel) -> None:
        if isinstance(event, StepsTaken):
            moments.append((event.steps[-1].step + 1, time.perf_counter()))

    folder = context.folder / f"training-{precision}-{processes}"
    result = run_sequence(experiment, folder / "run", on_event, context.device)
    # The first steps start the loader processes. They are left out if later steps were reported separately.
    start = next(index for index, (done, _) in enumerate(moments) if done >= experiment.optimisation.steps // 3)
    (first, began), (last, ended) = moments[start], moments[-1]
    images = 2 * experiment.optimisation.batch_size
    context.record(
        "training_jpeg",
        precision=precision,
        processes=2 * processes,  # one set for task images, one for reference images
        images_per_second=images * (last - first) / (ended - began) if last > first else None,
        images_per_second_whole_stage=result.stages[0].images_per_second,
        peak_gpu_megabytes=result.stages[0].peak_memory_megabytes,
        seconds_by_part=result.stages[0].seconds_by_part,
    )


def measure_data(context: Context) -> None:
    """Measure evaluation and end-to-end training for each number of loader processes."""
    recipe = write_photo_recipe(context)
    with context.record.errors("evaluation"):
        clip = load_clip(Model(name=recipe["model"]), context.device)
        measure_evaluation(context, clip, TaskFolder.open(Task(path=str(context.folder / "test-photos"))))
        del clip
    for processes in context.sizes.processes:
        with context.record.errors("training_jpeg", processes=processes):
            measure_training(context, recipe, max(1, processes // 2), "bf16")


# Section 5: kernels and synchronisations


def profile_step(context: Context) -> None:
    """Record the ten slowest kernels of a step, and every host synchronisation of a stage."""
    sizes, device = context.sizes, context.device
    model = build_step_model(sizes).to(device)
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    for precision in ("bf16", "fp32"):
        with context.record.errors("kernels", precision=precision):
            step_benchmark.set_float32_precision(precision)
            options = step_options(context, precision)
            inputs = step_benchmark.make_inputs(sizes.classes[0], sizes.captions, model, options)
            step, _ = step_benchmark.build_and_warm(
                lambda inputs=inputs, options=options: step_benchmark.ours(model, inputs, options, online=False), device
            )
            with torch.profiler.profile(activities=[activity]) as profile:
                for _ in range(3):
                    step()
            on = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            kernels = sorted(profile.key_averages(), key=lambda kernel: -getattr(kernel, on))
            total = sum(getattr(kernel, on) for kernel in kernels)
            for kernel in kernels[:10]:
                microseconds = getattr(kernel, on)
                context.record(
                    "kernel",
                    precision=precision,
                    name=kernel.key[:120],
                    milliseconds_a_step=microseconds / 3_000,
                    calls_a_step=kernel.count / 3,
                    share=microseconds / total,
                )
    with context.record.errors("synchronisations"):
        find_synchronisations(context)


def find_synchronisations(context: Context) -> None:
    """Record the lines of code in which the host waits for the GPU during training."""
    recipe = write_small_recipe(context.folder, context.sizes)
    recipe["tasks"] = recipe["tasks"][:1]
    experiment = Experiment.model_validate(recipe)
    places: Counter[str] = Counter()
    if context.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_sequence(experiment, context.folder / "synchronisations" / "run", device=context.device)
    if context.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            file = Path(warning.filename)
            places[f"{'/'.join(file.parts[-2:])}:{warning.lineno}"] += 1
    context.record("synchronisations", steps=experiment.optimisation.steps, total=places.total())
    for place, times in places.most_common():
        context.record("synchronisation", place=place, times=times)


# Running the sections


class Section(NamedTuple):
    """A section's function, and its time limit on a GPU in seconds."""

    run: Callable[[Context], None]
    limit: float


# The sum of the limits is eight minutes.
SECTIONS = {
    "device": Section(measure_device, 30),
    "correctness": Section(check_correctness, 90),
    "step": Section(measure_step, 215),
    "data": Section(measure_data, 95),
    "profile": Section(profile_step, 50),
}

SMOKE_LIMIT = 300  # seconds; only a hanging section exceeds it, even on a busy CPU


def run_section(name: str, options: argparse.Namespace) -> None:
    """Run one section in this process."""
    sizes = SMOKE if options.smoke else Sizes()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS, as in runs of zscl
    with tempfile.TemporaryDirectory() as folder:
        context = Context(torch.device(options.device), sizes, Recorder(options.out, name), Path(folder))
        with context.record.errors(name):
            SECTIONS[name].run(context)


def run_sections(options: argparse.Namespace) -> None:
    """Run each section in a separate process and kill it at its time limit."""
    for name in options.sections:
        started = time.monotonic()
        command = [sys.executable, __file__, "--section", name, "--device", options.device, "--out", str(options.out)]
        process = subprocess.Popen([*command, *(["--smoke"] if options.smoke else [])], start_new_session=True)
        record, limit = Recorder(options.out, name), (SMOKE_LIMIT if options.smoke else SECTIONS[name].limit)
        try:
            code = process.wait(timeout=limit)
            if code:
                record("section_error", error=f"the process ended with exit code {code}")
        except subprocess.TimeoutExpired:
            record("section_error", error=f"stopped at its time limit of {limit:.0f} s")
        finally:
            end_group(process)
        record("section", seconds=round(time.monotonic() - started, 1))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a section, whose loader processes may still run after a timeout or a crash."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tables(file: Path) -> str:
    """Render results as Markdown, with a table per kind of result in the order of first appearance."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines():
        found = json.loads(line)
        del found["at_seconds"]
        kinds.setdefault(f"{found.pop('section')}: {found.pop('kind')}", []).append(found)
    parts = []
    for title, rows in kinds.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_cell(row.get(column)) for column in columns] for row in rows]
        lines = [columns, ["---"] * len(columns), *cells]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "**no**", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Run the sections and print the results as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, with a tiny model and little data")
    parser.add_argument("--device", default="cuda", help="default: the first GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="results are appended to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the results in FILE as tables")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(tables(options.table))
        return
    if options.smoke:
        options.device = "cpu"
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("found no CUDA device; --smoke runs every section on the CPU")
    if options.section:
        run_section(options.section, options)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run_sections(options)
    print(tables(options.out))


if __name__ == "__main__":
    main()
