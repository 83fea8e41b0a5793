"""A method is a composition of parts; a preset is a named composition.

method: zscl                                      # a preset
method: {preset: zscl, average: {every: 50}}      # a preset with changes; `null` takes a part out
method: {name: mine, task_loss: {}, distill: {}}  # a composition of one's own
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from schemas.base import ShorthandModel, StrictModel, TupleOf


def check_read(part: StrictModel, field: str, is_read: bool, by: str) -> None:
    """Refuse a setting that nothing reads: whoever gave it expects it to count."""
    value = getattr(part, field)
    if not is_read and value != type(part).model_fields[field].default:
        raise ValueError(f"found {field} {value!r}, which nothing reads, expected {by} beside it")


class TaskLoss(StrictModel):
    """Cross-entropy over the current task's class prompts (paper, section 3; method step 1)."""

    label_smoothing: float = Field(0.2, ge=0, lt=1, description="Share of the target spread over all classes")
    earlier_names: bool = Field(False, description="The earlier tasks' class prompts join the softmax")
    negatives: NonNegativeInt = Field(0, description="So many random reference texts join the softmax, drawn by stage")


class Distill(StrictModel):
    """Distillation from a frozen teacher (paper, section 4.1). A weight of 0 takes its loss out."""

    teacher: Literal["initial", "previous", "blended"] = Field(
        "initial",
        description="The model before the first stage, the one this stage starts from, or a blend of the two",
    )
    blend: float = Field(0.8, ge=0, le=1, description="Share of the stage's start in a blended teacher")
    images: Literal["reference", "task", "exemplars", "noise"] = Field(
        "reference",
        description="The reference set, the current task's images, exemplars of the earlier tasks, or uniform noise",
    )
    texts: Literal["reference", "class_prompts", "random_tokens"] = Field(
        "reference", description="The reference set, prompts of class names, or random sentences"
    )
    prompts_of: Literal["current", "others", "all"] = Field(
        "current", description="Whose class names: the current task's, the other tasks', or both"
    )
    random_texts: PositiveInt = Field(1000, description="How many random sentences")
    random_length: PositiveInt = Field(10, description="Tokens in a random sentence")
    image_weight: NonNegativeFloat = Field(1.0, description="Softmax over the texts, mean over the images")
    text_weight: NonNegativeFloat = Field(1.0, description="Softmax over the images, mean over the texts")
    similarity_weight: NonNegativeFloat = Field(0.0, description="Softmax over the images' similarities to each other")
    feature_weight: NonNegativeFloat = Field(0.0, description="Mean squared error of the image features")
    temperature: PositiveFloat = Field(2.0, description="T of the softmaxes; losses are multiplied by T²")

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> "Distill":
        softened = self.image_weight or self.text_weight or self.similarity_weight
        check_read(self, "temperature", bool(softened), "another weight than feature_weight")
        check_read(self, "blend", self.teacher == "blended", "teacher: blended")
        check_read(self, "prompts_of", self.texts == "class_prompts", "texts: class_prompts")
        for field in ("random_texts", "random_length"):
            check_read(self, field, self.texts == "random_tokens", "texts: random_tokens")
        return self

    @model_validator(mode="after")
    def _distils_something(self) -> "Distill":
        weights = [name for name in type(self).model_fields if name.endswith("_weight")]
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0, expected one above 0 (or distill: null)")
        return self


class Consolidate(StrictModel):
    """Weight consolidation: squared L2 distance to the weights at the stage's start."""

    weight: PositiveFloat = Field(1.0, description="Of the sum over all trained parameters, without ½")


class Average(StrictModel):
    """Weight ensemble: an average of the stage's start and the weights every so many steps (paper, section 4.2)."""

    every: PositiveInt = Field(100, description="Steps from one merge to the next")
    kind: Literal["mean", "exponential"] = Field(
        "mean", description="Plain running mean, or exponential moving average"
    )
    decay: float = Field(0.9, gt=0, lt=1, description="What an exponential average keeps of itself at a merge")
    start_share: float = Field(0.0, ge=0, lt=1, description="Share of the stage's start blended in after each merge")

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> "Average":
        check_read(self, "decay", self.kind == "exponential", "kind: exponential")
        return self


class Memory(StrictModel):
    """Exemplars of earlier tasks, herded on image features (iCaRL), shared out evenly over tasks and classes."""

    budget: PositiveInt = Field(10_000, description="Images in all")


class Merge(StrictModel):
    """After a stage, the weights are drawn back towards an anchor (WiSE-FT)."""

    anchor: Literal["stage_start", "initial"] = Field(
        "stage_start", description="The weights at the stage's start, or the initial model's"
    )
    share: float = Field(0.2, gt=0, lt=1, description="Share of the anchor")


def _dotted(path: str) -> str:
    if "." not in path or not all(map(str.isidentifier, path.split("."))):
        raise ValueError(f"found {path!r}, expected MODULE.NAME, the dotted name of a class or a function")
    return path


class CustomLoss(ShorthandModel):
    """A term of the loss that is not ours. A bare dotted name will do. **The code that it names is run.**

    It is called with a `zscl.extend.Stage` and the settings when a stage begins, and returns a `zscl.extend.Part`.
    """

    main_field: ClassVar[str] = "path"

    path: Annotated[str, AfterValidator(_dotted)] = Field(
        description="Dotted name MODULE.NAME of a class or a function, installed or in a folder of PYTHONPATH",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Its keyword arguments")


_LWF: Mapping[str, Any] = {"teacher": "previous", "images": "task", "texts": "class_prompts"}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "zero-shot": {},
    "finetune": {"task_loss": {}},
    "we": {"task_loss": {}, "average": {}},
    "wc": {"task_loss": {}, "consolidate": {}},
    "we+wc": {"task_loss": {}, "average": {}, "consolidate": {}},
    "wise-ft": {"task_loss": {}, "merge": {}},
    "lwf": {"task_loss": {}, "distill": _LWF},
    "lwf-vr": {"task_loss": {}, "distill": {**_LWF, "texts": "random_tokens"}},
    "icarl": {"task_loss": {}, "distill": {"images": "exemplars", "texts": "class_prompts"}, "memory": {}},
    "zscl*": {"task_loss": {}, "distill": {}, "average": {}},
    "zscl": {"task_loss": {}, "distill": {}, "average": {}, "consolidate": {}},
}
Preset = Literal["zero-shot", "finetune", "we", "wc", "we+wc", "wise-ft", "lwf", "lwf-vr", "icarl", "zscl*", "zscl"]
PARTS = ("distill", "consolidate", "average", "merge", "memory")


class Method(ShorthandModel):
    """Which parts act in a training step, and on the weights along the way. A bare preset will do."""

    main_field: ClassVar[str] = "preset"

    preset: Preset | None = Field(None, description="Where the parts that are not given come from")
    name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.*+-]*$",
        max_length=50,
        description="What results and runs call it; default: the preset",
    )
    task_loss: TaskLoss | None = Field(None, description="None: nothing is trained (zero-shot)")
    distill: Distill | None = Field(None, description="Distillation from a frozen teacher")
    consolidate: Consolidate | None = Field(None, description="Weight consolidation towards the stage's start")
    average: Average | None = Field(None, description="Weight ensemble along the stage")
    merge: Merge | None = Field(None, description="Weights drawn back after the stage")
    memory: Memory | None = Field(None, description="Exemplars of earlier tasks, to distil on")
    further_losses: TupleOf[CustomLoss] = Field(
        (), description="Terms of the loss from other code, added to the others"
    )
    train: Literal["model", "image_tower", "text_tower"] = Field("model", description="Which parameters are trained")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"preset": data}
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        parts = {
            part: _laid_over(settings, data.get(part, {})) for part, settings in PRESETS.get(str(preset), {}).items()
        }
        return {"name": preset or "custom", **_without_empty_name(data), **parts}

    @model_validator(mode="after")
    def _parts_need_a_task_loss(self) -> "Method":
        others = [part for part in PARTS if getattr(self, part) is not None]
        others += ["further_losses"] if self.further_losses else []
        if self.task_loss is None and others:
            raise ValueError(
                f"found {' and '.join(others)} without task_loss, expected a task loss to train on or no part"
            )
        return self

    @model_validator(mode="after")
    def _remembers_what_it_distils(self) -> "Method":
        exemplars = self.distill is not None and self.distill.images == "exemplars"
        if exemplars and self.memory is None:
            raise ValueError("distill.images is exemplars without memory, expected a memory that keeps them")
        if self.memory is not None and not exemplars:
            raise ValueError("found memory, but nothing reads it: expected distill.images to be exemplars")
        return self

    @model_validator(mode="after")
    def _trains_what_it_chooses(self) -> "Method":
        check_read(self, "train", self.task_loss is not None, "task_loss")
        return self

    @model_validator(mode="after")
    def _distils_into_a_trained_tower(self) -> "Method":
        if self.distill and self.train == "text_tower":
            raise ValueError(
                "train is text_tower with distill, expected model or image_tower: distillation's gradient goes to the "
                "image tower alone"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the reference set is read."""
        distilled = self.distill is not None and "reference" in (self.distill.images, self.distill.texts)
        return distilled or (self.task_loss is not None and self.task_loss.negatives > 0)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, by dotted path, but what the method is called; a part that is left out is null."""
        found = self.model_dump(mode="json", exclude={"name", "preset"})
        found["further_losses"] = {loss.path: json.dumps(loss.settings) for loss in self.further_losses}
        return _difference(found, {})

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the preset, by dotted path, its name aside; empty for the preset as it is."""
        if self.preset is None:
            return {}
        mine, preset = self.model_dump(), Method.model_validate(self.preset).model_dump()
        mine["further_losses"] = {loss.path: json.dumps(loss.settings) for loss in self.further_losses}
        return _difference(mine, preset | {"name": self.name})


def _laid_over(preset: Mapping[str, Any], given: Any) -> Any:
    """A part of a preset with the fields that are given instead; whatever else is given stands alone."""
    return {**preset, **given} if isinstance(given, Mapping) else given


def _without_empty_name(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name" or value}


def _difference(mine: dict[str, Any], other: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mine.items():
        theirs = other.get(key)
        if isinstance(value, dict):  # a part that the preset does not have differs in all its settings
            found |= _difference(value, theirs if isinstance(theirs, dict) else {}, f"{prefix}{key}.")
        elif key not in other or value != theirs:
            found[prefix + key] = value
    return found
