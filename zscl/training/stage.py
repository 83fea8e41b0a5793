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
from zscl.data.loader import Loader, build_loader
from zscl.data.task import TaskFolder
from zscl.methods.interfaces import StageContext, Teacher
from zscl.methods.terms import build_objective
from zscl.methods.weight_averaging import WeightAverager, build_averager, trained_parameters
from zscl.models.clip import Clip, image_size
from zscl.models.pruned_forward import PrunedForward
from zscl.runtime.distributed import all_gather_unique, rank, rank_slice, world_size
from zscl.runtime.seeding import derive_seed
from zscl.runtime.timing import Clock, peak_memory_megabytes
from zscl.training.batches import training_batches
from zscl.training.checkpoint import CheckpointWriter, State, is_compatible, read_checkpoint
from zscl.training.loss_log import LossLog
from zscl.training.optim import build_optimizer, learning_rate_factor, select_trained_parameters
from zscl.training.snapshots import SnapshotWriter, place_of
from zscl.training.step import GlobalBatchForward, shares_prompts, train_step
from zscl.training.throughput import ThroughputMonitor

Report = Callable[[StepsTaken | CheckpointWritten | WorkersUsed | Note], None]


def train_stage(
    experiment: Experiment,
    stage: int,
    folder: TaskFolder,
    clip: Clip,
    teacher: Teacher | None,
    extra_texts: Sequence[str],
    device: torch.device,
    report: Report,
    checkpoint: Path | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    extra_averages: Sequence[Average | None] = (),
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
    select_trained_parameters(model, experiment.method.train)
    tokens = clip.tokenizer([*folder.prompts(folder.templates[0]), *extra_texts]).to(device)
    pruned = PrunedForward(
        model,
        tokens,
        rank_prompts=rank_slice(len(tokens)) if shares_prompts(len(tokens)) else range(len(tokens)),
        compute=experiment.compute,
        unused_embeddings_constant=optimisation.weight_decay == 0,
    )
    for note in pruned.notes:
        report(Note(text=note))
    trained = trained_parameters(model)
    averages = [experiment.method.average, *extra_averages]
    blended = any(average and average.start_share for average in averages)
    looks_back = experiment.method.consolidate is not None or bool(experiment.method.further_losses) or blended
    start = [parameter.detach().clone() for parameter in trained] if looks_back else []
    clock = Clock()
    if teacher is not None:
        teacher = replace(teacher, image_features=clock.around("teacher", teacher.image_features))
    context = StageContext(optimisation.batch_size, optimisation.reference_batch_size, trained, start, teacher)
    objective = build_objective(experiment, context)
    batch_sizes = [optimisation.batch_size, *([optimisation.reference_batch_size] if teacher else [])]
    forward = GlobalBatchForward(
        towers=distribute(pruned, image_size(model), *batch_sizes),
        prompts=len(tokens),
        scale=model.logit_scale.detach().exp(),  # type: ignore[operator]
        batch_size=optimisation.batch_size,
        reference_batch_size=optimisation.reference_batch_size,
        precision=optimisation.precision,
    )
    optimizer = build_optimizer(trained, task.learning_rate or optimisation.learning_rate, experiment)
    warmup = experiment.stage_warmup(task)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, steps))
    averagers = [build_averager(average, model, start, experiment.compute.savings.multi_tensor) for average in averages]
    step_hooks: list[WeightAverager | SnapshotWriter] = [
        *averagers,
        *snapshot_writers(experiment, stage, checkpoint, pruned),
    ]
    log = LossLog(stage, task.name, sum(batch_sizes), report)
    loader = build_loader(experiment.compute, device, report)
    state = StageState(experiment.seed, stage, model, optimizer, schedule, averagers, log, loader, clock, identity)
    first_step = state.restore(checkpoint)
    batches = training_batches(experiment, stage, folder, clip, teacher.images if teacher else None, loader, first_step)
    batches = clock.over("data", batches)
    throughput = ThroughputMonitor(
        stage, sum(map(len, map(rank_slice, batch_sizes))), clock, device, report, first_step
    )
    checkpoints = CheckpointWriter(checkpoint, experiment.compute.checkpoint, report, stop_requested, first_step)

    for step in range(first_step, steps):
        state.seed_step(step)
        learning_rate = float(schedule.get_last_lr()[0])
        named, norm = train_step(forward, objective, optimizer, schedule, next(batches), optimisation.max_gradient_norm)
        with clock("averaging"):
            for follower in step_hooks:
                follower.after_step(step)
        log.add(step, learning_rate, named, norm)
        if step + 1 == checkpoints.next_poll_step < steps:
            log.flush()
            loader.check_over_workers()
            with clock("checkpoint"):
                checkpoints.maybe_save(step + 1, state.state)
            throughput.poll(step + 1)
    for follower in step_hooks:
        follower.after_step(steps)

    log.flush()
    loader.check_over_workers()
    for each in averagers:
        log.check_weights_finite(each.model)
    checkpoints.wait()
    optimizer.zero_grad()  # gradients would stay in memory, and in every copy of the model
    for module in {model, *(each.model for each in averagers)}:
        pruned.restore_embeddings(module)
    result = StageResult(
        stage=stage,
        task=task.name,
        steps=steps,
        images_seen=steps * sum(batch_sizes),
        train_seconds=log.seconds,
        images_per_second=steps * sum(batch_sizes) / log.seconds,
        peak_memory_megabytes=peak_memory_megabytes(device),
        seconds_by_part=clock.seconds | {"student": log.seconds - sum(clock.seconds.values())},
        merges=averagers[0].merges,
        losses=log.steps[-1].losses,
        warnings=tuple(log.spike_warnings),
        broken=tuple(all_gather_unique(loader.broken)),
    )
    results = [result.model_copy(update={"merges": each.merges}) for each in averagers]
    return [(each.model, result) for each, result in zip(averagers, results, strict=True)], log.steps


def snapshot_writers(
    experiment: Experiment, stage: int, checkpoint: Path | None, towers: PrunedForward
) -> list[SnapshotWriter]:
    """What keeps a stage's weights along the way, beside its checkpoint, where the recipe asks for it."""
    every, task = experiment.compute.snapshots_every, experiment.tasks[stage - 1]
    if every is None or checkpoint is None:
        return []
    place = place_of(checkpoint.parent, stage, task.name)
    return [SnapshotWriter(place, every, experiment.stage_steps(task), towers.named_trained_parameters)]


@dataclass(frozen=True)
class StageState:
    """A stage's state between two steps: what a checkpoint holds."""

    seed: int
    stage: int
    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    averagers: Sequence[WeightAverager]
    log: LossLog
    loader: Loader
    clock: Clock
    identity: str = ""

    def seed_step(self, step: int) -> None:
        """Make what is random in the model (dropout) a function of the step, so that no generator need be kept."""
        torch.manual_seed(derive_seed(self.seed, self.stage, "step", step, rank()))

    def state(self) -> State:
        """What it takes to go on from here; all workers ask for it together."""
        return {
            "stage": self.stage,
            "identity": self.identity,
            "step": len(self.log.steps),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "handed_on": [each.state_dict() for each in self.averagers],
            "curves": [step.model_dump() for step in self.log.steps],
            "seconds": self.log.seconds,
            "seconds_by_part": dict(self.clock.seconds),
            "broken": all_gather_unique(self.loader.broken),
            "broken_of_sets": [all_gather_unique(read.broken) for read in self.loader.sets],
        }

    def restore(self, checkpoint: Path | None) -> int:
        """Take up what the checkpoint holds, if there is one for this stage. Returns the steps taken already."""
        note = self.log.note
        state = read_checkpoint(checkpoint, self.stage, note)
        if state is None:
            return 0
        if state.get("identity", self.identity) != self.identity:
            raise InputError(
                f"{checkpoint}: found the checkpoint of another run's stage (identity {state['identity']}), expected "
                f"{self.identity}; remove the file, to begin the stage again"
            )
        if not is_compatible(state, self.model):
            note(
                f"{checkpoint}: found weights of other shapes, made with other compute.savings; the stage begins again"
            )
            return 0
        if len(state["handed_on"]) != len(self.averagers):
            note(f"{checkpoint}: found averages for other runs beside this one; the stage begins again")
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for each, kept in zip(self.averagers, state["handed_on"], strict=True):
            each.load_state_dict(kept)
        self.log.restore([StepLosses.model_validate(step) for step in state["curves"]], state["seconds"])
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
        torch.zeros(len(rank_slice(size)), 3, *image_size).to(weight) if size else None
        for size in (*batch_sizes, 0)[:2]
    )
    for _ in range(2):
        encoded = parallel(images, references)
        torch.stack([features.sum() for features in encoded if features is not None]).sum().backward()
    return parallel
