"""An experiment: what is trained on what, in which order, how, and judged how."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, model_validator

from schemas.algorithm import algorithm
from schemas.base import Share, ShorthandModel, StrictModel, TupleOf, anchor
from schemas.compute import Compute, Tracking
from schemas.data import ClassIncremental, Reference, Task, check_names
from schemas.errors import did_you_mean
from schemas.method import Method

LOCAL_MODEL = "local-dir:"
LONGEST_NAME = 100  # characters: folders, locks and files are named after it, and after the method
MOST_WARMUP = 100  # steps, where a recipe does not say how many


def _anchor_model(name: str, info: ValidationInfo) -> str:
    if not name.startswith(LOCAL_MODEL):
        return name
    return LOCAL_MODEL + anchor(name.removeprefix(LOCAL_MODEL), info)


def _anchor_file(tag_or_file: str, info: ValidationInfo) -> str:
    is_file = "/" in tag_or_file or tag_or_file.endswith((".safetensors", ".pt", ".pth", ".bin"))
    return anchor(tag_or_file, info) if is_file else tag_or_file


class Model(ShorthandModel):
    """An open_clip model. In a recipe, a bare name will do."""

    main_field: ClassVar[str] = "name"

    name: Annotated[str, AfterValidator(_anchor_model)] = Field(
        min_length=1,
        description="open_clip name, `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, or `embedded` for the shipped one",
    )
    pretrained: Annotated[str, AfterValidator(_anchor_file)] | None = Field(
        None, description="open_clip tag or weights file, for a plain open_clip name"
    )

    @model_validator(mode="after")
    def _has_weights(self) -> "Model":
        self_contained = self.name == "embedded" or self.name.startswith((LOCAL_MODEL, "hf-hub:"))
        if self_contained and self.pretrained:
            raise ValueError(f"'{self.name}' brings its weights, expected no pretrained beside it")
        if not self_contained and not self.pretrained:
            raise ValueError(
                f"found no pretrained beside '{self.name}', expected the weights that open_clip has for it (openai, "
                "laion2b_s34b_b88k, …) or a file of them" + did_you_mean(self.name, ["embedded"])
            )
        return self


class Optimisation(StrictModel):
    """AdamW with linear warm-up and cosine decay, afresh in every stage. Batch sizes are global."""

    steps: PositiveInt = Field(1000, description="Updates a stage")
    batch_size: PositiveInt = Field(64, description="Task images a step, over all workers")
    reference_batch_size: PositiveInt = Field(64, description="Reference images a step, over all workers")
    learning_rate: PositiveFloat = Field(1e-5, description="At its highest, right behind the warm-up")
    warmup_steps: NonNegativeInt | None = Field(
        None,
        description=f"Steps of linear warm-up, of those of the stage; default: a tenth of these, at most {MOST_WARMUP}",
    )
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the gradients' mean and mean square"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, relative to the learning rate")
    max_gradient_norm: PositiveFloat | None = Field(
        None, description="Gradients of a larger norm, over all trained parameters, are scaled down to it"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast of the two towers")


class HeldOut(StrictModel):
    """A part of every task's training images, drawn class by class, that is not trained on."""

    share: float = Field(0.2, gt=0, lt=1, description="Of each class's training images")
    seed: NonNegativeInt = Field(0, description="Of the draw; the same part for all runs with it")
    judged_on: Literal["held_out", "test"] = Field(
        "held_out", description="held_out: the test images are never looked at; test: the part is only left out"
    )


class Evaluation(StrictModel):
    """Top-1 accuracy on each task's test split, among that task's classes."""

    templates: Literal["all", "first"] = Field("all", description="Templates averaged into a class embedding")
    held_out: HeldOut | None = Field(None, description="Judge on a part of the training images instead")


class Experiment(StrictModel):
    """A sequence of tasks, learnt by one method."""

    name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.-]*$",
        max_length=LONGEST_NAME,
        description="Default: the recipe's file name, with - for other characters than letters, digits and _.-",
    )
    model: Model = Field(description="What the first stage starts from: the initial model")
    tasks: TupleOf[Task] = Field((), description="The stages, in order")
    class_incremental: ClassIncremental | None = Field(
        None, description="Instead of tasks: one dataset, a group of its classes a stage"
    )
    reference: Reference | None = Field(None, description="What is distilled on: images and texts of any kind")
    method: Method = Field(description="What acts in a training step, and on the weights along the way")
    optimisation: Optimisation = Field(Optimisation(), description="Steps, batches and AdamW")
    evaluation: Evaluation = Field(Evaluation(), description="What the matrix is measured on")
    seed: int = Field(0, ge=0, description="Of everything that is drawn: images, augmentation, dropout, exemplars")
    compute: Compute = Field(Compute(), description="Where it runs; no part of what is computed")
    tracking: Tracking = Field(Tracking(), description="Where it is recorded; no part of what is computed")

    @model_validator(mode="after")
    def _fits_together(self) -> "Experiment":
        self._check_stages()
        if self.method.needs_reference and self.reference is None:
            part = "distill" if self.method.distill else "task_loss.negatives"
            raise ValueError(f"method.{part} needs reference (images and texts to distil on), found none")
        for task in self.tasks:
            if self.method.task_loss and self.stage_warmup(task) > self.stage_steps(task):
                raise ValueError(
                    f"optimisation.warmup_steps is {self.optimisation.warmup_steps}, expected at most the "
                    f"{self.stage_steps(task)} steps of stage '{task.name}'"
                )
        self._refuse_what_cannot_be_distilled()
        self._refuse_savings_that_are_none()
        largest = min(self.optimisation.batch_size, self.optimisation.reference_batch_size)
        if self.compute.workers > largest:
            raise ValueError(
                f"compute.workers is {self.compute.workers}, expected at most {largest}: "
                "every worker needs an image of each global batch"
            )
        return self

    def _check_stages(self) -> None:
        check_names(self.tasks)
        if not self.tasks and self.class_incremental is None:
            raise ValueError("tasks: found none, expected at least one (or class_incremental)")
        if self.class_incremental is not None:
            for task in self.tasks:
                if task.path != self.class_incremental.path or task.classes is None:
                    raise ValueError(
                        f"tasks: found '{task.name}' beside class_incremental, expected one or the other: the stages "
                        "are cut from the dataset"
                    )

    def _refuse_what_cannot_be_distilled(self) -> None:
        distill = self.method.distill
        if distill and distill.prompts_of == "others" and len(self.tasks) == 1:
            raise ValueError("method.distill.prompts_of is others, but there is only one task, expected more of them")
        if distill and distill.similarity_weight and self.optimisation.reference_batch_size < 2:
            raise ValueError(
                "optimisation.reference_batch_size is 1 with method.distill.similarity_weight above 0, expected at "
                "least 2: images are compared with each other"
            )

    def _refuse_savings_that_are_none(self) -> None:
        reason = (
            "the unused embeddings decay, too (optimisation.weight_decay)"
            if self.optimisation.weight_decay
            else "the text tower is not trained"
            if self.method.train == "image_tower"
            else None
        )
        if self.compute.savings.used_embeddings == "always" and reason:
            raise ValueError(f"compute.savings.used_embeddings is always, expected auto or never: {reason}")
        distill = self.method.distill
        stored = distill and distill.teacher == "initial" and distill.images in ("reference", "task")
        if self.compute.teacher_features == "ahead" and distill and not stored:
            raise ValueError(
                "compute.teacher_features is ahead, expected auto: no other stage or run meets the features of a "
                "teacher that is not the initial model, of exemplars or of noise"
            )

    @property
    def warnings(self) -> list[str]:
        """What is allowed but hardly meant, a sentence each."""
        every = self.method.average.every if self.method.average else 0
        return [
            f"method.average.every is {every}, but stage '{task.name}' has {self.stage_steps(task)} steps: what it "
            "hands on is the mean of its start and its first step; expected fewer, "
            f"{max(1, self.stage_steps(task) // 10)}, say"
            for task in self.tasks
            if self.stage_steps(task) < every
        ]

    def stage_steps(self, task: Task) -> int:
        """Updates of the task's stage."""
        return (task.steps or self.optimisation.steps) if self.method.task_loss else 0

    def stage_warmup(self, task: Task) -> int:
        """Steps of linear warm-up in the task's stage."""
        given = self.optimisation.warmup_steps
        return min(MOST_WARMUP, self.stage_steps(task) // 10) if given is None else given

    @property
    def warmup_steps(self) -> int | None:
        """Steps of linear warm-up in every stage; `None` where stages of different lengths have their own."""
        found = {self.stage_warmup(task) for task in self.tasks}
        return found.pop() if len(found) == 1 else self.optimisation.warmup_steps

    @property
    def settings(self) -> dict[str, Any]:
        """What is trained by beside the method's parts, by dotted path: alike where methods are compared.

        Settings that this method does not read are left out.
        """
        if self.method.task_loss is None:
            return {}
        unread = {"reference_batch_size"} if self.method.distill is None else set()
        found = self.optimisation.model_dump(mode="json", exclude=unread)
        settings = {f"optimisation.{field}": value for field, value in found.items()}
        settings["optimisation.warmup_steps"] = self.warmup_steps
        if self.class_incremental is not None:
            stages = self.class_incremental.model_dump(mode="json", include={"first", "increment", "epochs"})
            return settings | {f"class_incremental.{field}": value for field, value in stages.items()}
        for task in self.tasks:
            own = task.model_dump(mode="json", include={"learning_rate", "steps", "shots"})
            settings |= {f"tasks.{task.name}.{field}": value for field, value in own.items()}
        return settings

    def fingerprint(self, contents: Mapping[str, str]) -> str:
        """Identify what is computed, wherever it runs and however it is called. Returns 16 hexadecimal digits.

        Args:
            contents: as of `identity`.
        """
        identity = json.dumps(self.identity(contents), sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def identity(self, contents: Mapping[str, str]) -> dict[str, Any]:
        """Everything that the numbers depend on, the version of the algorithm among it.

        Settings that this method does not read do not count, nor what the method is called.

        Args:
            contents: maps each location in the recipe (a task's path, the reference set, the model, the path of a
                further loss) to a digest of what lies there.
        """
        identity = self.model_dump(mode="json", exclude={"name", "compute", "tracking"})
        identity["algorithm"] = algorithm()
        for label in ("name", "preset"):  # `method: zscl` and its parts spelt out compute the same
            del identity["method"][label]
        identity["model"] = contents[self.model.name]
        identity["optimisation"]["warmup_steps"] = self.warmup_steps
        if self.class_incremental is None:
            del identity["class_incremental"]
        else:  # its tasks say the rest
            identity["class_incremental"] = self.class_incremental.template
        for task in identity["tasks"]:
            task["path"] = contents[task["path"]]
            if task["shots"] is None:
                del task["shots"]
        # As before there were such fields.
        if self.method.further_losses:
            for loss in identity["method"]["further_losses"]:
                loss["code"] = contents[loss["path"]]
        else:
            del identity["method"]["further_losses"]
        if self.optimisation.max_gradient_norm is None:
            del identity["optimisation"]["max_gradient_norm"]
        if self.evaluation.held_out is None:
            del identity["evaluation"]["held_out"]
        if self.method.distill is None:
            del identity["optimisation"]["reference_batch_size"]
        identity["reference"] = None
        if self.method.needs_reference and self.reference is not None:
            identity["reference"] = [contents["reference"], self.reference.max_texts]
        if self.method.task_loss is None:
            identity["optimisation"] = {"precision": self.optimisation.precision}
            for task in identity["tasks"]:
                del task["steps"], task["learning_rate"]
            del identity["seed"]
        return identity
