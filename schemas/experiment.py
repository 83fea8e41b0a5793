"""The recipe: model, tasks, method, optimisation, evaluation, compute and tracking, with the checks between them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, model_validator

from schemas.algorithm import algorithm_version
from schemas.base import Share, ShorthandModel, StrictModel, TupleOf, resolve_location
from schemas.compute import Compute, Tracking
from schemas.data import ClassIncremental, Reference, Task, check_task_names
from schemas.errors import ErrorCode, InputError, did_you_mean
from schemas.method import Method

LOCAL_MODEL = "local-dir:"
MAX_NAME_LENGTH = 100  # characters: names of folders, locks and files contain it and the method's name
MAX_DEFAULT_WARMUP = 100  # steps, if the recipe does not set optimisation.warmup_steps


def _resolve_model_name(name: str, info: ValidationInfo) -> str:
    if not name.startswith(LOCAL_MODEL):
        return name
    return LOCAL_MODEL + resolve_location(name.removeprefix(LOCAL_MODEL), info)


def _resolve_weights_file(tag_or_file: str, info: ValidationInfo) -> str:
    is_file = "/" in tag_or_file or tag_or_file.endswith((".safetensors", ".pt", ".pth", ".bin"))
    return resolve_location(tag_or_file, info) if is_file else tag_or_file


class Model(ShorthandModel):
    """An open_clip model. A plain string in place of the section is the name."""

    main_field: ClassVar[str] = "name"

    name: Annotated[str, AfterValidator(_resolve_model_name)] = Field(
        min_length=1,
        description="open_clip name, `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or `embedded` for the included model",
    )
    pretrained: Annotated[str, AfterValidator(_resolve_weights_file)] | None = Field(
        None, description="open_clip tag or weights file, for a plain open_clip name"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "Model":
        self_contained = self.name == "embedded" or self.name.startswith((LOCAL_MODEL, "hf-hub:"))
        if self_contained and self.pretrained:
            raise InputError(
                f"'{self.name}' includes its weights; remove pretrained",
                code=ErrorCode.CONFLICT,
                field="pretrained",
            )
        if not self_contained and not self.pretrained:
            raise InputError(
                f"found no pretrained for '{self.name}', expected the tag of open_clip's weights (openai, "
                "laion2b_s34b_b88k, …) or a weights file" + did_you_mean(self.name, ["embedded"]),
                code=ErrorCode.MISSING_VALUE,
                field="pretrained",
            )
        return self


class Optimisation(StrictModel):
    """AdamW with linear warm-up and cosine decay, restarted in every stage. Batch sizes are global."""

    steps: PositiveInt = Field(1000, description="Optimizer steps per stage")
    batch_size: PositiveInt = Field(64, description="Task images per step, over all workers")
    reference_batch_size: PositiveInt = Field(64, description="Reference images per step, over all workers")
    learning_rate: PositiveFloat = Field(1e-5, description="Peak value, at the end of the warm-up")
    warmup_steps: NonNegativeInt | None = Field(
        None,
        description=f"Steps of linear warm-up; default: a tenth of the stage's steps, at most {MAX_DEFAULT_WARMUP}",
    )
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the first and second moments of the gradients"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decoupled weight decay, multiplied by the learning rate"
    )
    max_gradient_norm: PositiveFloat | None = Field(
        None, description="Gradient clipping: maximum norm over all trained parameters"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast in the image and text towers")


class HeldOut(StrictModel):
    """A part of every task's training images, drawn per class, that is not used for training."""

    share: float = Field(0.2, gt=0, lt=1, description="Fraction of each class's training images")
    seed: NonNegativeInt = Field(0, description="Seed of the draw; runs with the same seed hold out the same images")
    judged_on: Literal["held_out", "test"] = Field(
        "held_out",
        description="held_out: evaluate on the held-out images, never on test images; test: evaluate on test images",
    )


class Evaluation(StrictModel):
    """Settings of the evaluation.

    It measures top-1 accuracy on each task's test split, among the classes of that task.
    """

    templates: Literal["all", "first"] = Field("all", description="Templates that are averaged into a class embedding")
    held_out: HeldOut | None = Field(None, description="Hold out a part of the training images, to evaluate on it")


class Experiment(StrictModel):
    """A recipe: a sequence of tasks that one method learns."""

    name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.-]*$",
        max_length=MAX_NAME_LENGTH,
        description="Default: the recipe's file name, with - in place of characters other than letters, digits and _.-",
    )
    model: Model = Field(description="The initial model: the first stage starts from it")
    tasks: TupleOf[Task] = Field((), description="The stages, in order")
    class_incremental: ClassIncremental | None = Field(
        None, description="Instead of tasks: one dataset, one group of its classes per stage"
    )
    reference: Reference | None = Field(None, description="Images and texts for distillation")
    method: Method = Field(description="Loss terms, weight averaging and exemplars")
    optimisation: Optimisation = Field(Optimisation(), description="Steps, batches and AdamW")
    evaluation: Evaluation = Field(Evaluation(), description="How the accuracy matrix is measured")
    seed: int = Field(0, ge=0, description="Seed of all random draws: images, augmentation, dropout, exemplars")
    compute: Compute = Field(Compute(), description="Where it runs; does not change the results")
    tracking: Tracking = Field(Tracking(), description="Where it is recorded; does not change the results")

    @model_validator(mode="after")
    def _check_consistency(self) -> "Experiment":
        self._check_stages()
        if self.method.needs_reference and self.reference is None:
            part = "distill" if self.method.distill else "task_loss.negatives"
            raise InputError(
                f"method.{part} needs reference (images and texts), found none",
                code=ErrorCode.MISSING_VALUE,
                field="reference",
            )
        for task in self.tasks:
            if self.method.task_loss and self.stage_warmup(task) > self.stage_steps(task):
                raise InputError(
                    f"optimisation.warmup_steps is {self.optimisation.warmup_steps}, expected at most the "
                    f"{self.stage_steps(task)} steps of stage '{task.name}'",
                    code=ErrorCode.INVALID_VALUE,
                    field="optimisation.warmup_steps",
                )
        self._check_distillation()
        self._check_savings()
        max_workers = min(self.optimisation.batch_size, self.optimisation.reference_batch_size)
        if self.compute.workers > max_workers:
            raise InputError(
                f"compute.workers is {self.compute.workers}, expected at most {max_workers}: "
                "every worker needs an image of each global batch",
                code=ErrorCode.INVALID_VALUE,
                field="compute.workers",
            )
        return self

    def _check_stages(self) -> None:
        check_task_names(self.tasks)
        if not self.tasks and self.class_incremental is None:
            raise InputError(
                "tasks: found none, expected at least one (or class_incremental)",
                code=ErrorCode.MISSING_VALUE,
                field="tasks",
            )
        if self.class_incremental is not None:
            for task in self.tasks:
                if task.path != self.class_incremental.path or task.classes is None:
                    raise InputError(
                        f"tasks cannot be used with class_incremental, which makes the stages from its dataset (found "
                        f"the task '{task.name}'). Remove one of them",
                        code=ErrorCode.CONFLICT,
                        field="tasks",
                    )

    def _check_distillation(self) -> None:
        distill = self.method.distill
        if distill and distill.prompts_of == "others" and len(self.tasks) == 1:
            raise InputError(
                "method.distill.prompts_of=others needs several tasks, found one",
                code=ErrorCode.CONFLICT,
                field="method.distill.prompts_of",
            )
        if distill and distill.similarity_weight and self.optimisation.reference_batch_size < 2:
            raise InputError(
                "optimisation.reference_batch_size is 1, expected at least 2, because "
                "method.distill.similarity_weight compares the images of a batch with each other",
                code=ErrorCode.INVALID_VALUE,
                field="optimisation.reference_batch_size",
            )

    def _check_savings(self) -> None:
        reason = (
            "optimisation.weight_decay changes the unused embeddings, too"
            if self.optimisation.weight_decay
            else "the text tower is not trained"
            if self.method.train == "image_tower"
            else None
        )
        if self.compute.savings.used_embeddings == "always" and reason:
            raise InputError(
                f"compute.savings.used_embeddings is always, expected auto or never: {reason}",
                code=ErrorCode.CONFLICT,
                field="compute.savings.used_embeddings",
            )
        distill = self.method.distill
        is_reusable = distill and distill.teacher == "initial" and distill.images in ("reference", "task")
        if self.compute.teacher_features == "ahead" and distill and not is_reusable:
            raise InputError(
                "compute.teacher_features is ahead, expected auto: other stages and runs can reuse only the initial "
                "model's features of reference or task images",
                code=ErrorCode.CONFLICT,
                field="compute.teacher_features",
            )

    @property
    def warnings(self) -> list[str]:
        """Messages about settings that are valid but probably not intended."""
        every = self.method.average.every if self.method.average else 0
        return [
            f"method.average.every is {every}, but stage '{task.name}' has {self.stage_steps(task)} steps: its "
            "model is the mean of its start and its first step; expected a smaller value, for example "
            f"{max(1, self.stage_steps(task) // 10)}"
            for task in self.tasks
            if self.stage_steps(task) < every
        ]

    def stage_steps(self, task: Task) -> int:
        """Return the number of optimizer steps in the task's stage; 0 if the method has no task loss."""
        return (task.steps or self.optimisation.steps) if self.method.task_loss else 0

    def stage_warmup(self, task: Task) -> int:
        """Return the number of linear warm-up steps in the task's stage."""
        warmup = self.optimisation.warmup_steps
        return min(MAX_DEFAULT_WARMUP, self.stage_steps(task) // 10) if warmup is None else warmup

    @property
    def warmup_steps(self) -> int | None:
        """Steps of linear warm-up in every stage; `None` if the default differs between stages."""
        warmups = {self.stage_warmup(task) for task in self.tasks}
        return warmups.pop() if len(warmups) == 1 else self.optimisation.warmup_steps

    @property
    def settings(self) -> dict[str, Any]:
        """Training settings outside the section `method`, by dotted path.

        Methods are comparable only if these settings are equal. Settings that the recipe's method does not use are
        excluded.
        """
        if self.method.task_loss is None:
            return {}
        unread = {"reference_batch_size"} if self.method.distill is None else set()
        optimisation = self.optimisation.model_dump(mode="json", exclude=unread)
        settings = {f"optimisation.{field}": value for field, value in optimisation.items()}
        settings["optimisation.warmup_steps"] = self.warmup_steps
        if self.class_incremental is not None:
            stages = self.class_incremental.model_dump(mode="json", include={"first", "increment", "epochs"})
            return settings | {f"class_incremental.{field}": value for field, value in stages.items()}
        for task in self.tasks:
            overrides = task.model_dump(mode="json", include={"learning_rate", "steps", "shots"})
            settings |= {f"tasks.{task.name}.{field}": value for field, value in overrides.items()}
        return settings

    def fingerprint(self, digests: Mapping[str, str]) -> str:
        """Return a hash of everything that the results depend on, see `identity`.

        Args:
            digests: The content hash of each input, by its location in the recipe, as in `identity`.

        Returns:
            16 hexadecimal digits.
        """
        identity = json.dumps(self.identity(digests), sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def identity(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """Return everything that the results depend on: settings, content hashes of inputs and algorithm version.

        The experiment's name, the method's name, `compute`, `tracking` and settings that the method does not use are
        excluded.

        Args:
            digests: The content hash of each input. The keys are the tasks' paths, the model's name, the dotted names
                of custom losses, and "reference" for the reference set.

        Returns:
            Nested dicts and lists that can be written as JSON.
        """
        identity = self.model_dump(mode="json", exclude={"name", "compute", "tracking"})
        identity["algorithm"] = algorithm_version()
        for label in ("name", "preset"):  # a preset and its parts without a preset have the same results
            del identity["method"][label]
        identity["model"] = digests[self.model.name]
        identity["optimisation"]["warmup_steps"] = self.warmup_steps
        if self.class_incremental is None:
            del identity["class_incremental"]
        else:  # the other settings are part of the tasks
            identity["class_incremental"] = self.class_incremental.template
        for task in identity["tasks"]:
            task["path"] = digests[task["path"]]
            if task["shots"] is None:
                del task["shots"]
        # Fields that are newer than existing runs are excluded if unused, so that the runs' fingerprints remain valid.
        custom_losses = identity["method"].pop("custom_losses")
        if custom_losses:  # under the field's former name, which existing fingerprints contain
            identity["method"]["further_losses"] = [{**loss, "code": digests[loss["path"]]} for loss in custom_losses]
        if self.optimisation.max_gradient_norm is None:
            del identity["optimisation"]["max_gradient_norm"]
        if self.evaluation.held_out is None:
            del identity["evaluation"]["held_out"]
        if self.method.distill is None:
            del identity["optimisation"]["reference_batch_size"]
        identity["reference"] = None
        if self.method.needs_reference and self.reference is not None:
            identity["reference"] = [digests["reference"], self.reference.max_texts]
        if self.method.task_loss is None:
            identity["optimisation"] = {"precision": self.optimisation.precision}
            for task in identity["tasks"]:
                del task["steps"], task["learning_rate"]
            del identity["seed"]
        return identity
