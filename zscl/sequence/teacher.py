"""Builds the teacher of each stage: its model, its cached features, and the images and texts for distillation."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from torch import nn

from schemas.errors import ErrorCode, InputError
from schemas.events import ImagesEmbedded, Note
from schemas.experiment import Experiment, Model
from schemas.results import EmbeddingReport
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import build_loader
from zscl.data.sample import NoiseSamples, Samples
from zscl.data.task import TaskFolder
from zscl.methods import teacher_cache
from zscl.methods.distillation_texts import distillation_tokens, embed_texts
from zscl.methods.exemplars import load_exemplars
from zscl.methods.interfaces import Teacher
from zscl.methods.weight_averaging import interpolate
from zscl.models.clip import Clip, freeze, image_size, load_clip
from zscl.runtime.distributed import rank
from zscl.sequence.layout import teacher_cache_folder
from zscl.sequence.resolve import ResolvedExperiment, resolve

Report = Callable[[BaseModel], None]


class LazyModel:
    """A frozen model that is loaded at the first call and can be unloaded."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._model: nn.Module | None = None

    def __call__(self) -> nn.Module:
        """Return the model; load it first if it is not in memory."""
        self._model = self._model or self._load()
        return self._model

    def unload(self) -> None:
        """Free the model's memory; the next call loads it again."""
        self._model = None


def load_frozen(model: Model, device: torch.device) -> nn.Module:
    """Load a model whose parameters need no gradients, for use as a teacher or in an interpolation of weights."""
    return freeze(load_clip(model, device).model)


@dataclass
class TeacherBuilder:
    """Builds the teacher of each stage of a run.

    Attributes:
        resolved: The run's experiment.
        cache_folder: The folder of the teacher's cached features, which several runs share.
        device: The device of the teacher's model.
        report: Callback for events.
    """

    resolved: ResolvedExperiment
    cache_folder: Path
    device: torch.device
    report: Report
    _initial: LazyModel = field(init=False)

    def __post_init__(self) -> None:
        self._initial = LazyModel(lambda: load_frozen(self.resolved.experiment.model, self.device))

    def build(self, stage: int, clip: Clip, exemplars: Sequence[Path]) -> Teacher | None:
        """Build the teacher of a stage. All ranks must call this.

        Args:
            stage: The stage's number, from 1.
            clip: The model at the start of the stage.
            exemplars: The folders with the exemplars of the earlier stages.

        Returns:
            The teacher; `None` if the method does not use distillation, or if there are no images for it yet.
        """
        experiment, task = self.resolved.experiment, self.resolved.tasks[stage - 1]
        distill = experiment.method.distill
        images = self._select_images(task, clip, exemplars)
        if distill is None or images is None:
            return None
        model, model_digest = self._select_model(clip)
        texts = embed_texts(
            distillation_tokens(distill, clip, task, self.resolved.tasks, self.resolved.reference, experiment.seed),
            model,
            folder=self.cache_folder,
            weights_digest=model_digest,
            device=self.device,
            on_note=self._note,
        )
        precision = experiment.optimisation.precision
        encode = teacher_cache.build_encoder(model, precision)
        uncached = Teacher(images, texts, lambda batch, identities: encode(batch))
        policy = feature_policy(experiment, stage, images)
        if policy == "never":
            return uncached
        assert isinstance(images, IndexedSamples)
        assert model_digest is not None
        cache = teacher_cache.open_feature_cache(
            self.cache_folder, clip, model_digest, precision, images, texts.shape[1], self._note
        )
        if cache is None:
            return uncached
        features = teacher_cache.CachedFeatures(cache, encode, self._note)
        if policy == "ahead":
            self._fill(features, images, clip)
            model.unload()
        return Teacher(images, texts, features)

    def _select_images(self, task: TaskFolder, clip: Clip, exemplars: Sequence[Path]) -> Samples | None:
        """Return the images for distillation; `None` without distillation, or if there are no exemplars yet."""
        method = self.resolved.experiment.method
        if method.distill is None:
            return None
        match method.distill.images:
            case "reference":
                assert self.resolved.reference is not None
                return self.resolved.reference.images
            case "task":
                return task.train
            case "exemplars":
                assert method.memory is not None
                return load_exemplars(exemplars, method.memory.budget)
            case "noise":
                return NoiseSamples(image_size(clip.model))

    def _select_model(self, clip: Clip) -> tuple[LazyModel, str | None]:
        """Return the teacher's model and its digest. The digest is `None` if only this stage uses the model."""
        distill = self.resolved.experiment.method.distill
        assert distill is not None
        if distill.teacher == "initial":
            return self._initial, self.resolved.model_digest
        model = freeze(deepcopy(clip.model))
        if distill.teacher == "blended":
            initial = load_frozen(self.resolved.experiment.model, self.device)
            interpolate(list(model.parameters()), list(initial.parameters()), 1 - distill.blend)
        return LazyModel(lambda: model), None

    def _fill(self, features: teacher_cache.CachedFeatures, images: IndexedSamples, clip: Clip) -> None:
        """Compute the teacher's features of all images whose features are not cached yet, before training."""
        compute = self.resolved.experiment.compute
        computed = features.fill(
            images,
            clip,
            replace(build_loader(compute, self.device, self.report), labels_on_cpu=True),
            compute.evaluation_batch_size,
            on_progress=lambda done, total: self.report(ImagesEmbedded(done=done, total=total)),
        )
        if computed:
            cache = features.cache
            self._note(f"Teacher embedded {computed} images, once: {cache.megabytes:.1f} MB in {cache.folder}")

    def _note(self, text: str) -> None:
        self.report(Note(text=text))


def feature_policy(experiment: Experiment, stage: int, samples: Samples) -> Literal["ahead", "as_met", "never"]:
    """Decide whether and when the teacher's features of the images for distillation are cached.

    Features are not cached if they cannot be reused: with a teacher that only one stage uses, for exemplars, for noise,
    and for remote images, which cannot be identified by an index.

    Args:
        experiment: The experiment.
        stage: The stage's number, from 1.
        samples: The images for distillation.

    Returns:
        `ahead`: all features are computed before training and cached; `as_met`: features are computed during training
        when they are first needed, and cached; `never`: no feature is cached.
    """
    distill, policy = experiment.method.distill, experiment.compute.teacher_features
    assert distill is not None
    is_reusable = distill.teacher == "initial" and distill.images in ("reference", "task")
    if policy == "never" or not is_reusable or not isinstance(samples, IndexedSamples):
        return "never"
    if policy != "auto":
        return policy
    tasks = experiment.tasks if distill.images == "reference" else experiment.tasks[stage - 1 : stage]
    draws = [experiment.stage_steps(task) * experiment.optimisation.reference_batch_size for task in tasks]
    coverage = teacher_cache.expected_coverage(len(samples), draws)
    return "ahead" if coverage >= teacher_cache.PRECOMPUTE_COVERAGE else "as_met"


def check_embeddable(resolved: ResolvedExperiment) -> IndexedSamples:
    """Check that the teacher's features of an experiment's reference images can be computed before training.

    Args:
        resolved: The experiment.

    Returns:
        The reference images.

    Raises:
        InputError: The method does not distil from the initial model on a reference set, or the reference images are
            remote.
    """
    method, reference = resolved.experiment.method, resolved.reference
    if method.distill is None or method.distill.teacher != "initial" or method.distill.images != "reference":
        raise InputError(
            f"method: '{method.name}' does not distil from the initial model on a reference set, expected a method "
            "that does (zscl, zscl*): only these features can be computed in advance",
            code=ErrorCode.UNSUPPORTED,
            field="method",
        )
    assert reference is not None
    if not isinstance(reference.images, IndexedSamples):
        raise InputError(
            f"reference.images: found remote shards ({reference.images.urls[0]}), expected local ones: the features "
            "of remote images cannot be computed in advance",
            code=ErrorCode.UNSUPPORTED,
            field="reference.images",
        )
    return reference.images


def embed_reference(
    experiment: Experiment,
    run: Path,
    report: Report = lambda event: None,
    device: torch.device | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> EmbeddingReport:
    """Compute and cache the teacher's features that a run will read, without training. All ranks must call this.

    Args:
        experiment: The experiment.
        run: The folder of the run that will read the features.
        report: Callback for events, on rank 0.
        device: The device; default: CUDA if available.
        stop_requested: Unused. The process can be killed at any time, because features are cached when computed.

    Returns:
        A summary of the cached features.

    Raises:
        InputError: The features cannot be computed before training, or an input is missing or broken.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = experiment.compute.model_copy(update={"teacher_features": "ahead"})
    resolved = resolve(experiment.model_copy(update={"compute": compute}))
    images = check_embeddable(resolved)
    folder = teacher_cache_folder(run)
    builder = TeacherBuilder(resolved, folder, device, report if rank() == 0 else lambda event: None)
    teacher = builder.build(1, load_clip(experiment.model, device), exemplars=())
    assert teacher is not None
    if not isinstance(teacher.image_features, teacher_cache.CachedFeatures):
        raise InputError(
            f"{folder}: cannot be written, expected a writable folder with space for the features",
            code=ErrorCode.NOT_WRITABLE,
        )
    cache = teacher.image_features.cache
    return EmbeddingReport(
        folder=str(cache.folder), images=len(images), texts=len(teacher.texts), megabytes=cache.megabytes
    )
