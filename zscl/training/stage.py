"""Training of one stage: builds the model's forward pass, objective, optimizer and data, and runs the training loop."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from schemas.errors import ErrorCode, InputError
from schemas.events import CheckpointWritten, Note, StepsTaken, WorkersUsed
from schemas.experiment import Experiment
from schemas.method import Average
from schemas.results import StageResult, StepLosses
from zscl.data.loader import Loader, build_loader
from zscl.data.task import TaskFolder
from zscl.methods.interfaces import Batch, StageContext, Teacher
from zscl.methods.terms import Objective, build_objective
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
from zscl.training.snapshots import SnapshotWriter
from zscl.training.step import GlobalBatchForward, has_sharded_prompts, train_step
from zscl.training.throughput import ThroughputMonitor

Report = Callable[[StepsTaken | CheckpointWritten | WorkersUsed | Note], None]


def train_stage(
    experiment: Experiment,
    stage: int,
    task: TaskFolder,
    clip: Clip,
    teacher: Teacher | None,
    extra_texts: Sequence[str],
    device: torch.device,
    report: Report,
    checkpoint: Path | None = None,
    snapshots: Path | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    extra_averages: Sequence[Average | None] = (),
    identity: str = "",
) -> tuple[list[tuple[nn.Module, StageResult]], list[StepLosses]]:
    """Train `clip.model` on one task, from step 0 or from the stage's checkpoint. All ranks must call this.

    Args:
        experiment: The experiment: method, optimisation, compute and seed.
        stage: The stage's number, from 1.
        task: The stage's task.
        clip: The model at the start of the stage; `clip.model` is trained in place.
        teacher: The teacher; `None` if the stage does not use distillation.
        extra_texts: Texts that are classes in the softmax of the task loss, in addition to the task's class prompts.
        device: The model's device.
        report: Callback for events, called about once a second.
        checkpoint: The checkpoint's path (see `compute.checkpoint`); if `None`, no checkpoint is written.
        snapshots: The folder for snapshots (see `compute.snapshots_every`); if `None`, no snapshot is written.
        stop_requested: Returns whether the run should stop; called on rank 0 about once a second.
        extra_averages: Averaging settings of other runs that take the same training steps. The weights of this stage
            are also averaged with each of these settings.
        identity: Content hash of all inputs of the stage's training. A checkpoint with another identity is an error.

    Returns:
        A list of pairs (resulting model, result of the stage), one for the averaging settings of the recipe and one for
        each of `extra_averages`, in this order; and the losses of all steps.

    Raises:
        InputError: The checkpoint belongs to another run.
        NotFiniteError: A loss, the gradients or the weights are NaN or Inf.
        StoppedError: A stop was requested. The checkpoint is written.
    """
    optimisation, model, settings = experiment.optimisation, clip.model, experiment.tasks[stage - 1]
    steps = experiment.stage_steps(settings)

    # Trained parameters, and the forward pass through both towers.
    model.train()
    select_trained_parameters(model, experiment.method.train)
    tokens = clip.tokenizer([*task.prompts(task.templates[0]), *extra_texts]).to(device)
    pruned = _build_towers(experiment, model, tokens, report)
    trained = trained_parameters(model)
    averages = [experiment.method.average, *extra_averages]
    start = [parameter.detach().clone() for parameter in trained] if _reads_start(experiment, averages) else []

    # Objective: the loss terms of the method.
    clock = Clock()
    if teacher is not None:
        teacher = replace(teacher, image_features=clock.time_calls("teacher", teacher.image_features))
    global_sizes = optimisation.batch_size, optimisation.reference_batch_size
    context = StageContext(*global_sizes, trained, start, teacher)
    objective = build_objective(experiment, context)

    # Forward: features of the global batch.
    batch_sizes = [optimisation.batch_size, *([optimisation.reference_batch_size] if teacher else [])]
    towers = wrap_distributed(pruned, image_size(model), *batch_sizes)
    scale = model.logit_scale.detach().exp()  # type: ignore[operator]
    forward = GlobalBatchForward(towers, len(tokens), scale, *global_sizes, optimisation.precision)

    # Optimizer and learning-rate schedule.
    optimizer = build_optimizer(trained, settings.learning_rate or optimisation.learning_rate, experiment)
    warmup = experiment.stage_warmup(settings)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup, steps))

    # Averaging, and snapshots of the weights.
    multi_tensor, every = experiment.compute.savings.multi_tensor, experiment.compute.snapshots_every
    averagers = [build_averager(average, model, start, multi_tensor) for average in averages]
    step_hooks: list[WeightAverager | SnapshotWriter] = [*averagers]
    if every is not None and snapshots is not None:
        step_hooks.append(SnapshotWriter(snapshots, every, steps, pruned.named_trained_parameters))

    # Resume from the checkpoint, if there is one.
    log = LossLog(stage, settings.name, sum(batch_sizes), report)
    loader = build_loader(experiment.compute, device, report)
    state = StageState(experiment.seed, stage, model, optimizer, schedule, averagers, log, loader, clock, identity)
    first_step = state.restore(checkpoint)

    # Data, from the first step to take.
    batches = training_batches(experiment, stage, task, clip, teacher.images if teacher else None, loader, first_step)
    batches = clock.time_iterator("data", batches)

    # Monitoring and checkpoints.
    rank_images = sum(map(len, map(rank_slice, batch_sizes)))
    throughput = ThroughputMonitor(stage, rank_images, clock, device, report, first_step)
    checkpoints = CheckpointWriter(checkpoint, experiment.compute.checkpoint, report, stop_requested, first_step)

    StageTrainer(
        state, forward, objective, step_hooks, batches, throughput, checkpoints, optimisation.max_gradient_norm
    ).fit(first_step, steps)
    optimizer.zero_grad()  # otherwise gradients stay in memory and in every copy of the model
    for module in {model, *(averager.model for averager in averagers)}:
        pruned.restore_embeddings(module)
    return state.results(steps, device), log.steps


def _build_towers(experiment: Experiment, model: nn.Module, tokens: torch.Tensor, report: Report) -> PrunedForward:
    """Build the forward pass through both towers for this rank's prompts; report towers that cannot be pruned."""
    pruned = PrunedForward(
        model,
        tokens,
        rank_prompts=rank_slice(len(tokens)) if has_sharded_prompts(len(tokens)) else range(len(tokens)),
        compute=experiment.compute,
        unused_embeddings_constant=experiment.optimisation.weight_decay == 0,
    )
    for note in pruned.notes:
        report(Note(text=note))
    return pruned


def _reads_start(experiment: Experiment, averages: Sequence[Average | None]) -> bool:
    """Return whether a part of the method needs a copy of the weights at the start of the stage."""
    method = experiment.method
    blends_start = any(average and average.start_share for average in averages)
    return method.consolidate is not None or bool(method.custom_losses) or blends_start


@dataclass(frozen=True)
class StageState:
    """The objects whose state is saved in a checkpoint, between two steps of a stage.

    Attributes:
        seed: The experiment's seed.
        stage: The stage's number, from 1.
        model: The model in training (the student).
        optimizer: The optimizer of the model.
        schedule: The learning-rate schedule.
        averagers: The averager with the settings of the recipe, followed by those with the settings of other runs.
        log: The losses of all steps.
        loader: The data loader, which counts unusable samples.
        clock: Counts the seconds of each part of a step.
        identity: Content hash of all inputs of the stage's training.
    """

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
        """Seed torch as a function of the step, so that checkpoints need no state of random generators (dropout)."""
        torch.manual_seed(derive_seed(self.seed, self.stage, "step", step, rank()))

    def state_dict(self) -> State:
        """Return the content of a checkpoint. All ranks must call this."""
        return {
            "stage": self.stage,
            "identity": self.identity,
            "step": len(self.log.steps),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "handed_on": [averager.state_dict() for averager in self.averagers],
            "curves": [step.model_dump() for step in self.log.steps],
            "seconds": self.log.seconds,
            "seconds_by_part": dict(self.clock.seconds),
            "broken": all_gather_unique(self.loader.broken_samples),
            "broken_of_sets": [all_gather_unique(progress.broken_samples) for progress in self.loader.progress],
        }

    def restore(self, checkpoint: Path | None) -> int:
        """Restore the state from a checkpoint, if there is one for this stage. All ranks must call this.

        Args:
            checkpoint: The checkpoint's path; `None` if the run has none.

        Returns:
            The number of completed steps.

        Raises:
            InputError: The checkpoint belongs to another run.
        """
        notify = self.log.notify
        state = read_checkpoint(checkpoint, self.stage, notify)
        if state is None:
            return 0
        if state.get("identity", self.identity) != self.identity:
            raise InputError(
                f"{checkpoint}: found the checkpoint of another run (identity {state['identity']}), expected "
                f"{self.identity}; remove the file to start the stage again",
                code=ErrorCode.OTHER_RUN,
            )
        if not is_compatible(state, self.model):
            notify(
                f"{checkpoint}: found weights of other shapes, written with other compute.savings; the stage starts "
                "again"
            )
            return 0
        if len(state["handed_on"]) != len(self.averagers):
            notify(
                f"{checkpoint}: found the averages of {len(state['handed_on'])} runs, expected those of "
                f"{len(self.averagers)}; the stage starts again"
            )
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for averager, averager_state in zip(self.averagers, state["handed_on"], strict=True):
            averager.load_state_dict(averager_state)
        self.log.restore([StepLosses.model_validate(step) for step in state["curves"]], state["seconds"])
        self.clock.seconds.update(state.get("seconds_by_part", {}))
        self.loader.broken_samples.update(dict.fromkeys(state["broken"]))
        self.loader.restored_broken_samples.extend(state.get("broken_of_sets", []))
        notify(f"stage {self.stage} resumes after step {state['step']}")
        return int(state["step"])

    def results(self, steps: int, device: torch.device) -> list[tuple[nn.Module, StageResult]]:
        """Return the averaged model and the stage's result for every averager. All ranks must call this.

        Args:
            steps: Number of steps of the stage.
            device: The model's device.

        Returns:
            The models and results in the order of the averagers. The results differ only in the number of merges.
        """
        log, clock = self.log, self.clock
        result = StageResult(
            stage=self.stage,
            task=log.task,
            steps=steps,
            images_seen=steps * log.images_per_step,
            train_seconds=log.seconds,
            images_per_second=steps * log.images_per_step / log.seconds,
            peak_memory_megabytes=peak_memory_megabytes(device),
            seconds_by_part=clock.seconds | {"student": log.seconds - sum(clock.seconds.values())},
            merges=0,
            losses=log.steps[-1].losses,
            warnings=tuple(log.spike_warnings),
            broken=tuple(all_gather_unique(self.loader.broken_samples)),
        )
        return [(averager.model, result.model_copy(update={"merges": averager.merges})) for averager in self.averagers]


@dataclass(frozen=True)
class StageTrainer:
    """The training loop of a stage, with all objects that it needs.

    Attributes:
        state: The stage's state.
        forward: The student's forward pass.
        objective: The sum of the method's loss terms.
        step_hooks: Objects whose `after_step` is called after every step: averagers and the writer of snapshots.
        batches: This rank's slices of the global batches, starting with the first step to take.
        throughput: Reports images per second and the use of CPU and memory.
        checkpoints: Writes checkpoints and stops on request.
        max_gradient_norm: The L2 norm to which gradients are clipped; `None` disables clipping.
    """

    state: StageState
    forward: GlobalBatchForward
    objective: Objective
    step_hooks: Sequence[WeightAverager | SnapshotWriter]
    batches: Iterator[Batch]
    throughput: ThroughputMonitor
    checkpoints: CheckpointWriter
    max_gradient_norm: float | None

    def fit(self, first_step: int, steps: int) -> None:
        """Train from `first_step` to the end of the stage. All ranks must call this.

        Args:
            first_step: Number of completed steps.
            steps: Number of steps of the stage.

        Raises:
            NotFiniteError: A loss, the gradients or the weights are NaN or Inf.
            StoppedError: A stop was requested. The checkpoint is written.
        """
        state, log, clock, schedule = self.state, self.state.log, self.state.clock, self.state.schedule
        for step in range(first_step, steps):
            state.seed_step(step)
            learning_rate = float(schedule.get_last_lr()[0])
            losses, gradient_norm = train_step(
                self.forward, self.objective, state.optimizer, schedule, next(self.batches), self.max_gradient_norm
            )
            with clock("averaging"):
                for hook in self.step_hooks:
                    hook.after_step(step)
            log.add(step, learning_rate, losses, gradient_norm)
            if step + 1 == self.checkpoints.next_poll_step < steps:
                log.flush()
                state.loader.check_broken_across_ranks()
                with clock("checkpoint"):
                    self.checkpoints.maybe_save(step + 1, state.state_dict)
                self.throughput.poll(step + 1)
        for hook in self.step_hooks:
            hook.after_step(steps)

        log.flush()
        state.loader.check_broken_across_ranks()
        for averager in state.averagers:
            log.check_weights_finite(averager.model)
        self.checkpoints.wait()


def wrap_distributed(towers: nn.Module, image_size: tuple[int, int], *batch_sizes: int) -> nn.Module:
    """Wrap the student in DistributedDataParallel if there are several ranks.

    DistributedDataParallel changes the layout of its gradient buckets after the first backward passes, and the last
    bit of a sum over three or more ranks depends on the layout. Two passes over blank images, whose gradients are
    discarded, ensure that every step uses the final layout, including the first step after a resume.

    Args:
        towers: The student's towers.
        image_size: Height and width of the student's input images, in pixels.
        batch_sizes: The global batch size of the task images, and that of the reference images if there are any.

    Returns:
        The wrapped module; `towers` itself for a single rank.
    """
    if world_size() == 1:
        return towers
    weight = next(towers.parameters())
    devices = [weight.device] if weight.device.type == "cuda" else None
    with warnings.catch_warnings():  # newer versions of torch have another name for this argument
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
