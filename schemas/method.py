"""The recipe section `method`: a composition of losses, weight averaging and exemplars, or a named preset of them.

method: zscl                                      # a preset
method: {preset: zscl, average: {every: 50}}      # a preset with changes; `average: null` removes the averaging
method: {name: mine, task_loss: {}, distill: {}}  # a composition without a preset
"""

import json
import warnings
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
from schemas.errors import ErrorCode, InputError


def check_setting_used(part: StrictModel, field: str, is_used: bool, requirement: str) -> None:
    """Raise an error if a setting differs from its default but has no effect.

    Args:
        part: The section that has the setting.
        field: The setting's name.
        is_used: Whether the setting has an effect.
        requirement: What the recipe must also set for this setting to take effect; used in the error message.

    Raises:
        InputError: The setting has no effect, and differs from its default.
    """
    value = getattr(part, field)
    if not is_used and value != type(part).model_fields[field].default:
        raise InputError(
            f"{field}={value} has no effect without {requirement}",
            code=ErrorCode.UNUSED_SETTING,
            field=field,
        )


class TaskLoss(StrictModel):
    """Cross-entropy over the current task's class prompts (paper, section 3; method step 1)."""

    label_smoothing: float = Field(0.2, ge=0, lt=1, description="Target probability that is spread over all classes")
    earlier_names: bool = Field(False, description="Add the earlier tasks' class prompts to the softmax")
    negatives: NonNegativeInt = Field(
        0, description="Number of random reference texts in the softmax, drawn once per stage"
    )


class Distill(StrictModel):
    """Distillation from a frozen teacher (paper, section 4.1). A loss with weight 0 is not computed."""

    teacher: Literal["initial", "previous", "blended"] = Field(
        "initial",
        description="The model before the first stage, the model at the stage's start, or a blend of both",
    )
    blend: float = Field(0.8, ge=0, le=1, description="Interpolation weight of the stage's start in a blended teacher")
    images: Literal["reference", "task", "exemplars", "noise"] = Field(
        "reference",
        description="The reference set, the current task's images, exemplars of the earlier tasks, or uniform noise",
    )
    texts: Literal["reference", "class_prompts", "random_tokens"] = Field(
        "reference", description="The reference set, prompts of class names, or random sentences"
    )
    prompts_of: Literal["current", "others", "all"] = Field(
        "current", description="Class names of the current task, of the other tasks, or of all tasks"
    )
    random_texts: PositiveInt = Field(1000, description="Number of random sentences")
    random_length: PositiveInt = Field(10, description="Tokens in a random sentence")
    image_weight: NonNegativeFloat = Field(
        1.0, description="Weight of the loss with a softmax over the texts, mean over the images"
    )
    text_weight: NonNegativeFloat = Field(
        1.0, description="Weight of the loss with a softmax over the images, mean over the texts"
    )
    similarity_weight: NonNegativeFloat = Field(
        0.0, description="Weight of the loss with a softmax over the pairwise similarities of the images"
    )
    feature_weight: NonNegativeFloat = Field(0.0, description="Weight of the mean squared error of the image features")
    temperature: PositiveFloat = Field(
        2.0, description="Temperature T of the softmaxes; their losses are multiplied by T²"
    )

    @model_validator(mode="after")
    def _check_unused_settings(self) -> "Distill":
        has_softmax = self.image_weight or self.text_weight or self.similarity_weight
        check_setting_used(self, "temperature", bool(has_softmax), "a weight other than feature_weight")
        check_setting_used(self, "blend", self.teacher == "blended", "teacher: blended")
        check_setting_used(self, "prompts_of", self.texts == "class_prompts", "texts: class_prompts")
        for field in ("random_texts", "random_length"):
            check_setting_used(self, field, self.texts == "random_tokens", "texts: random_tokens")
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> "Distill":
        weights = [name for name in type(self).model_fields if name.endswith("_weight")]
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0, expected at least one above 0, or distill: null")
        return self


class Consolidate(StrictModel):
    """Weight consolidation: squared L2 distance to the weights at the stage's start."""

    weight: PositiveFloat = Field(
        1.0, description="Factor of the sum of squares over all trained parameters (without ½)"
    )


class Average(StrictModel):
    """Weight ensemble: an average of the weights at the stage's start and every N steps (paper, section 4.2)."""

    every: PositiveInt = Field(100, description="Steps from one merge to the next")
    kind: Literal["mean", "exponential"] = Field("mean", description="Running mean, or exponential moving average")
    decay: float = Field(0.9, gt=0, lt=1, description="Weight of the old average in an exponential average's update")
    start_share: float = Field(
        0.0, ge=0, lt=1, description="Interpolation weight of the stage's start, applied after each merge"
    )

    @model_validator(mode="after")
    def _check_unused_settings(self) -> "Average":
        check_setting_used(self, "decay", self.kind == "exponential", "kind: exponential")
        return self


class Memory(StrictModel):
    """Exemplars of earlier tasks, chosen by herding on image features (iCaRL), the same number per task and class."""

    budget: PositiveInt = Field(10_000, description="Total number of images")


class Merge(StrictModel):
    """Interpolation of the weights with the weights of an anchor model at the end of a stage (WiSE-FT)."""

    anchor: Literal["stage_start", "initial"] = Field(
        "stage_start", description="The weights at the stage's start, or the initial model's"
    )
    share: float = Field(0.2, gt=0, lt=1, description="Interpolation weight of the anchor")


def _check_dotted_name(path: str) -> str:
    if "." not in path or not all(map(str.isidentifier, path.split("."))):
        raise ValueError(f"found {path!r}, expected MODULE.NAME, the dotted name of a class or a function")
    return path


class CustomLoss(ShorthandModel):
    """A loss term from code outside this package. A plain string in place of the section is the dotted name.

    **The code that it names is executed.** At the start of a stage, it is called with a `zscl.extend.StageContext`
    and the settings, and returns a `zscl.extend.LossTerm`.
    """

    main_field: ClassVar[str] = "path"

    path: Annotated[str, AfterValidator(_check_dotted_name)] = Field(
        description="Dotted name MODULE.NAME of a class or a function, installed or in a folder of PYTHONPATH",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the call")


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
    """The parts of the method: loss terms, weight averaging and exemplars.

    A plain string in place of the section is the name of a preset.
    """

    main_field: ClassVar[str] = "preset"

    preset: Preset | None = Field(None, description="Provides the parts that the recipe does not set")
    name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.*+-]*$",
        max_length=50,
        description="The method's name in results and runs; default: the preset",
    )
    task_loss: TaskLoss | None = Field(None, description="null: nothing is trained (zero-shot)")
    distill: Distill | None = Field(None, description="Distillation from a frozen teacher")
    consolidate: Consolidate | None = Field(None, description="Weight consolidation towards the stage's start")
    average: Average | None = Field(None, description="Weight ensemble during the stage")
    merge: Merge | None = Field(None, description="Interpolation with an anchor after the stage")
    memory: Memory | None = Field(None, description="Exemplars of earlier tasks, for distillation")
    custom_losses: TupleOf[CustomLoss] = Field((), description="Loss terms from other code, added to the loss")
    train: Literal["model", "image_tower", "text_tower"] = Field("model", description="The parameters that are trained")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"preset": data}
        if not isinstance(data, dict):
            return data
        data = _rename_further_losses(data)
        preset = data.get("preset")
        parts = {
            part: _override_part(settings, data.get(part, {}))
            for part, settings in PRESETS.get(str(preset), {}).items()
        }
        return {"name": preset or "custom", **_without_empty_name(data), **parts}

    @model_validator(mode="after")
    def _check_task_loss(self) -> "Method":
        parts = [part for part in PARTS if getattr(self, part) is not None]
        parts += ["custom_losses"] if self.custom_losses else []
        if self.task_loss is None and parts:
            raise InputError(
                f"without task_loss, {' and '.join(parts)} cannot be used. Add task_loss, or remove these parts",
                code=ErrorCode.MISSING_VALUE,
                field="task_loss",
            )
        return self

    @model_validator(mode="after")
    def _check_memory(self) -> "Method":
        needs_memory = self.distill is not None and self.distill.images == "exemplars"
        if needs_memory and self.memory is None:
            raise InputError(
                "distill.images=exemplars needs memory, which selects and stores the exemplars",
                code=ErrorCode.MISSING_VALUE,
                field="memory",
            )
        if self.memory is not None and not needs_memory:
            raise InputError(
                "memory has no effect without distill.images=exemplars",
                code=ErrorCode.UNUSED_SETTING,
                field="memory",
            )
        return self

    @model_validator(mode="after")
    def _check_train(self) -> "Method":
        check_setting_used(self, "train", self.task_loss is not None, "task_loss")
        if self.distill and self.train == "text_tower":
            raise InputError(
                "train=text_tower cannot be used with distill, because distillation trains only the image tower. Set "
                "train to model or image_tower",
                code=ErrorCode.CONFLICT,
                field="train",
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the method reads the reference set."""
        distilled = self.distill is not None and "reference" in (self.distill.images, self.distill.texts)
        return distilled or (self.task_loss is not None and self.task_loss.negatives > 0)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings except the name and the preset, by dotted path. A part that the method lacks is `None`."""
        return _flatten_difference(self._dump(), {})

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the preset, by dotted path; empty without a preset."""
        if self.preset is None:
            return {}
        return _flatten_difference(self._dump(), Method.model_validate(self.preset).model_dump())

    def _dump(self) -> dict[str, Any]:
        """Return all settings except the name and the preset as nested dicts.

        `custom_losses` is a dict from each loss's dotted name to its settings in JSON.
        """
        dumped = self.model_dump(mode="json", exclude={"name", "preset"})
        dumped["custom_losses"] = {loss.path: json.dumps(loss.settings) for loss in self.custom_losses}
        return dumped


def _rename_further_losses(data: dict[str, Any]) -> dict[str, Any]:
    """Rename `further_losses`, the former name of `custom_losses`. Warn if it contains losses."""
    if "further_losses" not in data or "custom_losses" in data:
        return data
    if data["further_losses"]:
        warnings.warn("method.further_losses is deprecated: use method.custom_losses", FutureWarning, stacklevel=2)
    return {"custom_losses" if key == "further_losses" else key: value for key, value in data.items()}


def _override_part(preset: Mapping[str, Any], value: Any) -> Any:
    """Return a part's fields in the preset, overridden by those in the recipe.

    A `value` that is not a mapping, such as `None`, is returned in place of the fields.
    """
    return {**preset, **value} if isinstance(value, Mapping) else value


def _without_empty_name(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name" or value}


def _flatten_difference(settings: dict[str, Any], base: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that differ from `base`, by dotted path. Both arguments are nested dicts."""
    differences: dict[str, Any] = {}
    for key, value in settings.items():
        base_value = base.get(key)
        if isinstance(value, dict):  # all settings of a part that the base does not have are differences
            nested_base = base_value if isinstance(base_value, dict) else {}
            differences |= _flatten_difference(value, nested_base, f"{prefix}{key}.")
        elif key not in base or value != base_value:
            differences[prefix + key] = value
    return differences
