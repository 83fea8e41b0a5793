"""What a stage distils from: which teacher, which images and texts, and what of its embeddings is stored."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from torch import nn

from schemas.errors import InputError
from schemas.events import ImagesEmbedded, Note
from schemas.experiment import Experiment, Model
from schemas.results import Embedded
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
from zscl.sequence.resolve import ResolvedExperiment, resolve

Report = Callable[[BaseModel], None]


def teacher_cache_folder(run: Path) -> Path:
    """Where the teacher's embeddings lie: beside a run's folder, so that runs share them."""
    return run.parent / "teacher"


class LazyModel:
    """A frozen model that is loaded when it is first needed, and can be forgotten."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._model: nn.Module | None = None

    def __call__(self) -> nn.Module:
        """The model."""
        self._model = self._model or self._load()
        return self._model

    def unload(self) -> None:
        """Give its memory back; asked again, it is loaded again."""
        self._model = None


def load_frozen(model: Model, device: torch.device) -> nn.Module:
    """Load a model to look back at."""
    return freeze(load_clip(model, device).model)


@dataclass
class TeacherBuilder:
    """Makes each stage's teacher.

    opened: the experiment; store: where embeddings are kept; exemplars: the earlier stages' folders of them.
    """

    opened: ResolvedExperiment
    store: Path
    device: torch.device
    report: Report
    _initial: LazyModel = field(init=False)

    def __post_init__(self) -> None:
        self._initial = LazyModel(lambda: load_frozen(self.opened.experiment.model, self.device))

    def build(self, stage: int, clip: Clip, exemplars: Sequence[Path]) -> Teacher | None:
        """What a stage distils from; `None` where the method does not, or has nothing to distil on yet.

        Args:
            stage: counted from 1.
            clip: the stage's start.
            exemplars: what earlier stages left in memory.
        """
        experiment, task = self.opened.experiment, self.opened.tasks[stage - 1]
        distill = experiment.method.distill
        images = self._images(task, clip, exemplars)
        if distill is None or images is None:
            return None
        model, weights = self._model(clip)
        texts = embed_texts(
            distillation_tokens(distill, clip, task, self.opened.tasks, self.opened.reference, experiment.seed),
            model,
            store=self.store,
            weights=weights,
            device=self.device,
            note=self._note,
        )
        encode = teacher_cache.build_encoder(model, experiment.optimisation.precision)
        way = feature_policy(experiment, stage, images)
        if way == "never":
            return Teacher(images, texts, lambda shown, identities: encode(shown))
        assert isinstance(images, IndexedSamples)
        assert weights is not None
        precision = experiment.optimisation.precision
        store = teacher_cache.open_feature_store(
            self.store, clip, weights, precision, images, texts.shape[1], self._note
        )
        if store is None:
            return Teacher(images, texts, lambda shown, identities: encode(shown))
        stored = teacher_cache.StoredFeatures(store, encode, self._note)
        if way == "ahead":
            self._embed_ahead(stored, images, clip)
            model.unload()
        return Teacher(images, texts, stored)

    def _images(self, task: TaskFolder, clip: Clip, exemplars: Sequence[Path]) -> Samples | None:
        method = self.opened.experiment.method
        if method.distill is None:
            return None
        match method.distill.images:
            case "reference":
                assert self.opened.reference is not None
                return self.opened.reference.images
            case "task":
                return task.train
            case "exemplars":
                assert method.memory is not None
                return load_exemplars(exemplars, method.memory.budget)
            case "noise":
                return NoiseSamples(image_size(clip.model))

    def _model(self, clip: Clip) -> tuple[LazyModel, str | None]:
        """The teacher, and the digest of its weights where others can meet it again."""
        distill = self.opened.experiment.method.distill
        assert distill is not None
        if distill.teacher == "initial":
            return self._initial, self.opened.weights
        model = freeze(deepcopy(clip.model))
        if distill.teacher == "blended":
            initial = load_frozen(self.opened.experiment.model, self.device)
            interpolate(list(model.parameters()), list(initial.parameters()), 1 - distill.blend)
        return LazyModel(lambda: model), None

    def _embed_ahead(self, stored: teacher_cache.StoredFeatures, images: IndexedSamples, clip: Clip) -> None:
        compute = self.opened.experiment.compute
        computed = stored.fill(
            images,
            clip,
            replace(build_loader(compute, self.device, self.report), labels_stay=True),
            compute.evaluation_batch_size,
            progress=lambda done, total: self.report(ImagesEmbedded(done=done, total=total)),
        )
        if computed:
            store = stored.store
            self._note(f"Teacher embedded {computed} images, once: {store.megabytes:.1f} MB in {store.folder}")

    def _note(self, text: str) -> None:
        self.report(Note(text=text))


def feature_policy(experiment: Experiment, stage: int, images: Samples) -> Literal["ahead", "as_met", "never"]:
    """When the teacher's features of the images that a stage distils on are computed for the store, if ever.

    Never where no other stage or run could meet them: for a teacher of this stage alone, exemplars, noise, and remote
    images, which have no place.
    """
    distill, wanted = experiment.method.distill, experiment.compute.teacher_features
    assert distill is not None
    met_again = distill.teacher == "initial" and distill.images in ("reference", "task")
    if wanted == "never" or not met_again or not isinstance(images, IndexedSamples):
        return "never"
    if wanted != "auto":
        return wanted
    drawing = experiment.tasks if distill.images == "reference" else experiment.tasks[stage - 1 : stage]
    draws = [experiment.stage_steps(task) * experiment.optimisation.reference_batch_size for task in drawing]
    return "ahead" if teacher_cache.share_drawn(len(images), draws) >= teacher_cache.NEARLY_ALL else "as_met"


def check_embeddable(opened: ResolvedExperiment) -> IndexedSamples:
    """See that there is something to embed ahead. Returns the reference images.

    Raises:
        InputError: the method distils on nothing that could be, or the images are remote.
    """
    method, used = opened.experiment.method, opened.reference
    if method.distill is None or method.distill.teacher != "initial" or method.distill.images != "reference":
        raise InputError(
            f"method: '{method.name}' does not distil from the initial model on a reference set, expected a method "
            "that does (zscl, zscl*): nothing else can be embedded ahead"
        )
    assert used is not None
    if not isinstance(used.images, IndexedSamples):
        raise InputError(
            f"reference.images: found remote shards ({used.images.urls[0]}), expected local ones: the teacher embeds "
            "remote images as they are met"
        )
    return used.images


def embed_reference(
    experiment: Experiment,
    run: Path,
    report: Report = lambda progress: None,
    device: torch.device | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Embedded:
    """Fill the teacher's stores that a run in this folder will read, and train nothing.

    Every worker of a `torch.distributed` group calls this alike, as `run_sequence`. Killed, it has stored what it
    computed; so it does not ask whether to stop.

    Raises:
        InputError: the method distils on nothing that could be embedded ahead, or something is missing or broken.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = experiment.compute.model_copy(update={"teacher_features": "ahead"})
    opened = resolve(experiment.model_copy(update={"compute": compute}))
    images = check_embeddable(opened)
    teaching = TeacherBuilder(
        opened, teacher_cache_folder(run), device, report if rank() == 0 else lambda progress: None
    )
    teacher = teaching.build(1, load_clip(experiment.model, device), exemplars=())
    assert teacher is not None
    if not isinstance(teacher.image_features, teacher_cache.StoredFeatures):
        raise InputError(
            f"{teacher_cache_folder(run)}: cannot be written, expected a folder with room for the features"
        )
    store = teacher.image_features.store
    return Embedded(folder=str(store.folder), images=len(images), texts=len(teacher.texts), megabytes=store.megabytes)
