"""A method is a composition of parts; a preset is a named composition.

method: zscl                                      # a preset
method: {preset: zscl, average: {every: 50}}      # a preset with changes; `null` takes a part out
method: {name: mine, task_loss: {}, distill: {}}  # a composition of one's own
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from schemas.base import Abbreviable, Strict


class TaskLoss(Strict):
    """Cross-entropy over the current task's class prompts (paper, section 3; method step 1)."""

    label_smoothing: float = Field(0.2, ge=0, lt=1)


class Distill(Strict):
    """Feature-space distillation from a frozen teacher on the reference set (paper, section 4.1)."""

    teacher: Literal["initial"] = Field("initial", description="The model before the first stage")
    image_weight: NonNegativeFloat = Field(1.0, description="Softmax over the texts, mean over the images")
    text_weight: NonNegativeFloat = Field(1.0, description="Softmax over the images, mean over the texts")
    temperature: PositiveFloat = 2.0

    @model_validator(mode="after")
    def _distils_something(self) -> "Distill":
        if self.image_weight == 0 and self.text_weight == 0:
            raise ValueError("image_weight and text_weight are both 0, expected one above 0 (or distill: null)")
        return self


class Consolidate(Strict):
    """Weight consolidation: squared L2 distance to the weights at the stage's start."""

    weight: PositiveFloat = 1.0


class Average(Strict):
    """Weight ensemble: the running mean of the stage's start and every so many steps (paper, section 4.2)."""

    every: PositiveInt = Field(100, description="Steps from one merge to the next")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "zero-shot": {},
    "finetune": {"task_loss": {}},
    "zscl*": {"task_loss": {}, "distill": {}, "average": {}},
    "zscl": {"task_loss": {}, "distill": {}, "average": {}, "consolidate": {}},
}


class Method(Abbreviable):
    """Which parts act in a training step, and on the weights along the way. A bare preset will do."""

    main_field: ClassVar[str] = "preset"

    preset: Literal["zero-shot", "finetune", "zscl*", "zscl"] | None = Field(
        None, description="Where the parts that are not given come from"
    )
    name: str = Field(
        "", pattern=r"^[A-Za-z0-9_.*+-]*$", description="What results and runs call it; default: the preset"
    )
    task_loss: TaskLoss | None = Field(None, description="None: nothing is trained (zero-shot)")
    distill: Distill | None = None
    consolidate: Consolidate | None = None
    average: Average | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"preset": data}
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        return {"name": preset or "custom", **PRESETS.get(str(preset), {}), **_without_empty_name(data)}

    @model_validator(mode="after")
    def _parts_need_a_task_loss(self) -> "Method":
        others = [part for part in ("distill", "consolidate", "average") if getattr(self, part) is not None]
        if self.task_loss is None and others:
            raise ValueError(
                f"found {' and '.join(others)} without task_loss, expected a task loss to train on or no part"
            )
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the preset, by dotted path; empty for the preset as it is."""
        if self.preset is None:
            return {}
        mine, preset = self.model_dump(), Method.model_validate(self.preset).model_dump()
        return _difference(mine, preset)


def _without_empty_name(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "name" or value}


def _difference(mine: dict[str, Any], other: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mine.items():
        if isinstance(value, dict) and isinstance(other[key], dict):
            found |= _difference(value, other[key], f"{prefix}{key}.")
        elif value != other[key]:
            found[prefix + key] = value
    return found
