"""One stage: the step, and the loop that reads straight down."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from schemas.errors import InputError
from schemas.events import CheckpointWritten, Note, StepsTaken, WorkersUsed
from schemas.experiment import Experiment
from schemas.method import Average
from schemas.results import StageResult, StepLosses
from zscl.data.loader import Loader, loader_of
from zscl.data.task import TaskFolder
from zscl.methods.interfaces import Stage, Teacher
from zscl.methods.terms import build
from zscl.methods.weight_averaging import HandOn, hand_on, trained_parameters
from zscl.models.clip import Clip, image_size
from zscl.models.pruned_forward import Towers
from zscl.runtime.distributed import gather_sentences, rank, share, world_size
from zscl.runtime.seeding import seed_of
from zscl.runtime.timing import Clock, peak_memory
from zscl.training.batches import training_batches
from zscl.training.checkpoint import Checkpoints, State, fits, read_checkpoint
from zscl.training.loss_log import Curves
from zscl.training.optim import adamw, choose_trained, learning_rate_factor
from zscl.training.snapshots import Snapshots, place_of
from zscl.training.step import Student, shares_prompts, train_step
from zscl.training.throughput import Usage

Report = Callable[[StepsTaken | CheckpointWritten | WorkersUsed | Note], None]


def train_stage(
    experiment: Experiment,
    stage: int,
    folder: TaskFolder,
    clip: Clip,
    teacher: Teacher | None,
    further_texts: Sequence[str],
    device: torch.device,
    report: Report,
    checkpoint: Path | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    further_averages: Sequence[Average | None] = (),
    identity: str = "",
) -> tuple[list[tuple[nn.Module, StageResult]], list[StepLosses]]:
    """Train `clip.model` on one task, from the stage's start or from behind the step of its checkpoint.

    Args:
        experiment: method, optimisation and seed.
        stage: counted from 1.
        folder: the task's data.
        clip: the stage's start; its model is trained in place.
        teacher: for a stage that distils.
        further_texts: that join the softmax of the task loss beside the class prompts.
        device: where the model lies.
        report: told about steps, every second or so.
        checkpoint: file of the stage under way, written now and then (`compute.checkpoint`); without one, none is.
        asked_to_stop: asked on the main worker, every second or so.
        further_averages: that follow the same steps beside the method's own, for other runs.
        identity: of all that the stage's training reads; a checkpoint of another one is refused.

    Returns the model handed on and the stage's result, those of the further averages behind it, and every step's
    losses.

    Raises:
        InputError: the checkpoint is another run's.
        NotFiniteError: a loss or the gradients are no numbers any more.
        StoppedError: the stage was asked to stop; its checkpoint holds what it takes to go on.
    """
    optimisation, model, task = experiment.optimisation, clip.model, experiment.tasks[stage - 1]
    steps = experiment.stage_steps(task)

    # Everything is decided here; the loop below only trains.
    model.train()
    choose_trained(model, experiment.method.train)
    tokens = clip.tokenizer([*folder.prompts(folder.templates[0]), *further_texts]).to(device)
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
    averages = [experiment.method.average, *further_averages]
    blended = any(average and average.start_share for average in averages)
    looks_back = experiment.method.consolidate is not None or bool(experiment.method.further_losses) or blended
    start = [parameter.detach().clone() for parameter in trained] if looks_back else []
    clock = Clock()
    if teacher is not None:
        teacher = replace(teacher, image_features=clock.around("teacher", teacher.image_features))
    bound_to = Stage(optimisation.batch_size, optimisation.reference_batch_size, trained, start, teacher)
    losses_of = build(experiment, bound_to)
    batch_sizes = [optimisation.batch_size, *([optimisation.reference_batch_size] if teacher else [])]
    student = Student(
        towers=distribute(towers, image_size(model), *batch_sizes),
        prompts=len(tokens),
        scale=model.logit_scale.detach().exp(),  # type: ignore[operator]
        batch_size=optimisation.batch_size,
        reference_batch_size=optimisation.reference_batch_size,
        precision=optimisation.precision,
    )
    optimizer = adamw(trained, task.learning_rate or optimisation.learning_rate, experiment)
    warmup = experiment.stage_warmup(task)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, steps))
    handed_on = [hand_on(average, model, start, experiment.compute.savings.multi_tensor) for average in averages]
    followers: list[HandOn | Snapshots] = [*handed_on, *snapshots_of(experiment, stage, checkpoint, towers)]
    curves = Curves(stage, task.name, sum(batch_sizes), report)
    loader = loader_of(experiment.compute, device, report)
    under_way = UnderWay(experiment.seed, stage, model, optimizer, schedule, handed_on, curves, loader, clock, identity)
    first_step = under_way.go_on(checkpoint)
    batches = training_batches(experiment, stage, folder, clip, teacher.images if teacher else None, loader, first_step)
    batches = clock.over("data", batches)
    usage = Usage(stage, sum(map(len, map(share, batch_sizes))), clock, device, report, first_step)
    checkpoints = Checkpoints(checkpoint, experiment.compute.checkpoint, report, asked_to_stop, first_step)

    for step in range(first_step, steps):
        under_way.seed_step(step)
        learning_rate = float(schedule.get_last_lr()[0])
        named, norm = train_step(student, losses_of, optimizer, schedule, next(batches), optimisation.max_gradient_norm)
        with clock("averaging"):
            for follower in followers:
                follower.after_step(step)
        curves.add(step, learning_rate, named, norm)
        if step + 1 == checkpoints.next_look < steps:
            curves.flush()
            loader.check_over_workers()
            with clock("checkpoint"):
                checkpoints.look(step + 1, under_way.state)
            usage.look(step + 1)
    for follower in followers:
        follower.after_step(steps)

    curves.flush()
    loader.check_over_workers()
    for each in handed_on:
        curves.refuse_weights(each.model)
    checkpoints.end()
    optimizer.zero_grad()  # gradients would stay in memory, and in every copy of the model
    for module in {model, *(each.model for each in handed_on)}:
        towers.restore(module)
    result = StageResult(
        stage=stage,
        task=task.name,
        steps=steps,
        images_seen=steps * sum(batch_sizes),
        train_seconds=curves.seconds,
        images_per_second=steps * sum(batch_sizes) / curves.seconds,
        peak_memory_megabytes=peak_memory(device),
        seconds_by_part=clock.seconds | {"student": curves.seconds - sum(clock.seconds.values())},
        merges=handed_on[0].merges,
        losses=curves.steps[-1].losses,
        warnings=tuple(curves.explosions),
        broken=tuple(gather_sentences(loader.broken)),
    )
    results = [result.model_copy(update={"merges": each.merges}) for each in handed_on]
    return [(each.model, result) for each, result in zip(handed_on, results, strict=True)], curves.steps


def snapshots_of(experiment: Experiment, stage: int, checkpoint: Path | None, towers: Towers) -> list[Snapshots]:
    """What keeps a stage's weights along the way, beside its checkpoint, where the recipe asks for it."""
    every, task = experiment.compute.snapshots_every, experiment.tasks[stage - 1]
    if every is None or checkpoint is None:
        return []
    place = place_of(checkpoint.parent, stage, task.name)
    return [Snapshots(place, every, experiment.stage_steps(task), towers.trained)]


@dataclass(frozen=True)
class UnderWay:
    """A stage's state between two steps: what a checkpoint holds."""

    seed: int
    stage: int
    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    handed_on: Sequence[HandOn]
    curves: Curves
    loader: Loader
    clock: Clock
    identity: str = ""

    def seed_step(self, step: int) -> None:
        """Make what is random in the model (dropout) a function of the step, so that no generator need be kept."""
        torch.manual_seed(seed_of(self.seed, self.stage, "step", step, rank()))

    def state(self) -> State:
        """What it takes to go on from here; all workers ask for it together."""
        return {
            "stage": self.stage,
            "identity": self.identity,
            "step": len(self.curves.steps),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "handed_on": [each.state_dict() for each in self.handed_on],
            "curves": [step.model_dump() for step in self.curves.steps],
            "seconds": self.curves.seconds,
            "seconds_by_part": dict(self.clock.seconds),
            "broken": gather_sentences(self.loader.broken),
            "broken_of_sets": [gather_sentences(read.broken) for read in self.loader.sets],
        }

    def go_on(self, checkpoint: Path | None) -> int:
        """Take up what the checkpoint holds, if there is one for this stage. Returns the steps taken already."""
        note = self.curves.note
        state = read_checkpoint(checkpoint, self.stage, note)
        if state is None:
            return 0
        if state.get("identity", self.identity) != self.identity:
            raise InputError(
                f"{checkpoint}: found the checkpoint of another run's stage (identity {state['identity']}), expected "
                f"{self.identity}; remove the file, to begin the stage again"
            )
        if not fits(state, self.model):
            note(
                f"{checkpoint}: found weights of other shapes, made with other compute.savings; the stage begins again"
            )
            return 0
        if len(state["handed_on"]) != len(self.handed_on):
            note(f"{checkpoint}: found averages for other runs beside this one; the stage begins again")
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for each, kept in zip(self.handed_on, state["handed_on"], strict=True):
            each.load_state_dict(kept)
        self.curves.take_up([StepLosses.model_validate(step) for step in state["curves"]], state["seconds"])
        self.clock.seconds.update(state.get("seconds_by_part", {}))
        self.loader.broken.update(dict.fromkeys(state["broken"]))
        self.loader.resumed.extend(state.get("broken_of_sets", []))
        note(f"stage {self.stage} goes on behind step {state['step']}")
        return int(state["step"])


def distribute(towers: nn.Module, image_size: tuple[int, int], *batch_sizes: int) -> nn.Module:
    """Average gradients over the workers, where there are several.

    DistributedDataParallel lays gradients out anew behind its first backward passes, and what three workers' numbers
    add up to depends, in the last bit, on their layout. Two passes over blank images, for nothing else, give every step
    the final layout: the first one behind an interruption, too.

    Args:
        towers: the student.
        image_size: that they take, in pixels.
        batch_sizes: task images in a global batch, and distilled ones if there are any.
    """
    if world_size() == 1:
        return towers
    weight = next(towers.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else None
    with warnings.catch_warnings():  # of a name that newer versions of torch have another for
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        parallel = DistributedDataParallel(towers, device_ids=devices, broadcast_buffers=False, static_graph=True)
    images, references = (
        torch.zeros(len(share(size)), 3, *image_size).to(weight) if size else None for size in (*batch_sizes, 0)[:2]
    )
    for _ in range(2):
        encoded = parallel(images, references)
        torch.stack([features.sum() for features in encoded if features is not None]).sum().backward()
    return parallel
