"""One stage: the step, and the loop that reads straight down."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from schemas.base import InputError
from schemas.compute import Compute
from schemas.experiment import Experiment
from schemas.results import Note, StageResult, StepLosses, StepsTaken
from zscl import objective
from zscl.averaging import hand_on, trained_parameters
from zscl.distributed import gather_sentences, gather_with_gradient, rank, share, world_size
from zscl.model import Clip, precision_context
from zscl.objective import Batch, Features, Objective, Teacher
from zscl.shards import Sample, Samples, seed_of
from zscl.streams import Decode, Loader, TrainingImages
from zscl.tasks import TaskFolder
from zscl.towers import Towers

REPORT_EVERY_SECONDS = 1.0
Report = Callable[[StepsTaken | Note], None]


@dataclass(frozen=True)
class Student:
    """The model in training, seen from the step: batch in, global features out."""

    towers: nn.Module
    prompts: int
    scale: torch.Tensor
    batch_size: int
    reference_batch_size: int
    precision: str

    def __call__(self, batch: Batch) -> Features:
        """Encode this worker's images and class prompts; gather over the workers."""
        with precision_context(self.precision, batch.images.device):
            images, references, prompts = self.towers(batch.images, batch.references)
        return Features(
            images=gather_with_gradient(images, self.batch_size),
            prompts=gather_with_gradient(prompts, self.prompts) if shares_prompts(self.prompts) else prompts,
            references=None if references is None else gather_with_gradient(references, self.reference_batch_size),
            scale=self.scale,
        )


def shares_prompts(prompts: int) -> bool:
    """Whether the workers share the class prompts, or every one encodes all of them: too few to go round."""
    return prompts >= world_size()


def train_step(
    student: Student, losses_of: Objective, optimizer: Optimizer, schedule: LRScheduler, batch: Batch
) -> dict[str, torch.Tensor]:
    """Update the student once. Returns each named loss, detached."""
    named = losses_of(student(batch), batch)
    optimizer.zero_grad()
    torch.stack(list(named.values())).sum().backward()
    optimizer.step()
    schedule.step()
    return {name: loss.detach() for name, loss in named.items()}


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then half a cosine; `step` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= steps:  # asked for once behind the last step, and 0 / 0 where all of them warm up
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def train_stage(
    experiment: Experiment,
    stage: int,
    folder: TaskFolder,
    clip: Clip,
    teacher: Teacher | None,
    device: torch.device,
    report: Report,
) -> tuple[nn.Module, StageResult, list[StepLosses]]:
    """Train `clip.model` on one task.

    Args:
        experiment: method, optimisation and seed.
        stage: counted from 1.
        folder: the task's data.
        clip: the stage's start; its model is trained in place.
        teacher: for a stage that distils.
        device: where the model lies.
        report: told about steps, every second or so.

    Returns the model handed on, the stage's result, and every step's losses.
    """
    optimisation, model, task = experiment.optimisation, clip.model, experiment.tasks[stage - 1]
    steps = experiment.stage_steps(task)

    # Everything is decided here; the loop below only trains.
    model.train()
    choose_trained(model, experiment.method.train)
    tokens = clip.tokenizer(folder.prompts(folder.templates[0])).to(device)
    towers = Towers(
        model,
        tokens,
        own=share(len(tokens)) if shares_prompts(len(tokens)) else range(len(tokens)),
        compute=experiment.compute,
        unused_embeddings_stay=optimisation.weight_decay == 0,
    )
    for note in towers.notes:
        report(Note(text=note))
    trained = trained_parameters(model)
    start = [parameter.detach().clone() for parameter in trained] if experiment.method.looks_back else []
    losses_of = objective.build(experiment, trained, start, teacher)
    loader = loader_of(experiment.compute, device, report)
    batches = training_batches(experiment, stage, folder, clip, teacher.images if teacher else None, loader)
    student = Student(
        towers=distribute(towers, device),
        prompts=len(tokens),
        scale=model.logit_scale.detach().exp(),  # type: ignore[operator]
        batch_size=optimisation.batch_size,
        reference_batch_size=optimisation.reference_batch_size,
        precision=optimisation.precision,
    )
    optimizer = adamw(trained, task.learning_rate or optimisation.learning_rate, experiment)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, optimisation.warmup_steps, steps))
    handed_on = hand_on(experiment.method.average, model, start, experiment.compute.savings.multi_tensor)
    images_per_step = optimisation.batch_size + (optimisation.reference_batch_size if teacher else 0)
    journal = Journal(stage, task.name, images_per_step, report)

    for step in range(steps):
        learning_rate = float(schedule.get_last_lr()[0])
        named = train_step(student, losses_of, optimizer, schedule, next(batches))
        handed_on.after_step(step)
        journal.add(step, learning_rate, named)
    handed_on.after_step(steps)

    journal.flush()
    optimizer.zero_grad()  # gradients would stay in memory, and in every copy of the model
    for each in {model, handed_on.model}:
        towers.restore(each)
    result = StageResult(
        stage=stage,
        task=task.name,
        steps=steps,
        images_seen=steps * images_per_step,
        train_seconds=journal.seconds,
        images_per_second=steps * images_per_step / journal.seconds,
        merges=handed_on.merges,
        losses=journal.steps[-1].losses,
        broken=tuple(gather_sentences(loader.broken)),
    )
    return handed_on.model, result, journal.steps


def adamw(parameters: list[nn.Parameter], learning_rate: float, experiment: Experiment) -> AdamW:
    """The optimizer of a stage."""
    optimisation, savings = experiment.optimisation, experiment.compute.savings
    return AdamW(
        parameters,
        lr=learning_rate,
        betas=optimisation.betas,
        weight_decay=optimisation.weight_decay,
        fused=savings.fused_optimizer,
        foreach=None if savings.fused_optimizer else False,
    )


def loader_of(compute: Compute, device: torch.device, report: Callable[[Note], None]) -> Loader:
    """How a worker reads; what it skips is reported."""
    return Loader(
        device,
        compute.loader_processes,
        max_broken_share=compute.max_broken_share,
        note=lambda sentence: report(Note(text=sentence)),
    )


def training_batches(
    experiment: Experiment,
    stage: int,
    folder: TaskFolder,
    clip: Clip,
    distilled: Samples | None,
    loader: Loader,
) -> Iterator[Batch]:
    """This worker's endless batches of a stage: task images augmented, distilled ones as in evaluation."""
    optimisation = experiment.optimisation
    keep_bytes = experiment.compute.decoded_megabytes * 1_000_000 // (1 if distilled is None else 2)
    images = TrainingImages(
        samples=folder.train,
        decode=Decode(clip.train_transform, folder.label_of),
        seed=seed_of(experiment.seed, stage, "task"),
        batch_size=optimisation.batch_size,
        own=share(optimisation.batch_size),
        keep_bytes=keep_bytes,
    ).batches(loader)
    if distilled is None:
        return (Batch(batch, labels) for batch, labels in images)
    references = TrainingImages(
        samples=distilled,
        decode=Decode(clip.evaluation_transform, Sample.identity),
        seed=seed_of(experiment.seed, stage, "reference"),
        batch_size=optimisation.reference_batch_size,
        own=share(optimisation.reference_batch_size),
        keep_bytes=keep_bytes,
    ).batches(replace(loader, labels_stay=True))
    return (Batch(*ours, *theirs) for ours, theirs in zip(images, references, strict=True))


def choose_trained(model: nn.Module, train: str) -> None:
    """Train the model, its `image_tower` or its `text_tower`; never the logit scale (and a sigmoid model's bias)."""
    for name, parameter in model.named_parameters():
        tower = "image_tower" if name.startswith("visual.") else "text_tower"
        parameter.requires_grad_(train in ("model", tower) and name not in ("logit_scale", "logit_bias"))


def distribute(towers: nn.Module, device: torch.device) -> nn.Module:
    """Average gradients over the workers, where there are several."""
    if world_size() == 1:
        return towers
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(towers, device_ids=devices, broadcast_buffers=False, static_graph=True)


class NotFiniteError(InputError):
    """A loss is no number any more: the stage is lost, those before it are not."""


class Journal:
    """Every step's losses, reported now and then: reading a loss waits for the device."""

    def __init__(self, stage: int, task: str, images_per_step: int, report: Report) -> None:
        self.stage, self.task, self.images_per_step, self.report = stage, task, images_per_step, report
        self.steps: list[StepLosses] = []
        self._pending: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self._started = self._reported = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time since the stage's first step began."""
        return time.perf_counter() - self._started

    def add(self, step: int, learning_rate: float, named: dict[str, torch.Tensor]) -> None:
        """Keep a step; report those kept when it is time."""
        self._pending.append((step, learning_rate, named))
        if time.perf_counter() - self._reported >= REPORT_EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Report the steps kept."""
        if not self._pending:
            return
        names = list(self._pending[0][2])
        values = torch.stack([torch.stack([named[name] for name in names]) for _, _, named in self._pending])
        taken = [
            StepLosses(step=step, learning_rate=learning_rate, losses=dict(zip(names, row, strict=True)))
            for (step, learning_rate, _), row in zip(self._pending, values.tolist(), strict=True)
        ]
        for step in taken:
            for name, value in step.losses.items():
                if not math.isfinite(value):
                    raise NotFiniteError(
                        f"stage {self.stage} {self.task}: found the loss {name} {value} at step {step.step}, expected "
                        "a finite one"
                    )
        now = time.perf_counter()
        speed = len(taken) * self.images_per_step / max(now - self._reported, 1e-9)
        if rank() == 0:
            self.report(StepsTaken(stage=self.stage, task=self.task, steps=tuple(taken), images_per_second=speed))
        self.steps += taken
        self._pending, self._reported = [], now
