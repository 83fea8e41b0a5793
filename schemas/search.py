"""A search: an experiment with domains in place of values, and what is looked for in it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from schemas.base import ShorthandModel, StrictModel, TupleOf
from schemas.events import Progress
from schemas.results import Metrics, RedactedStr, Result

FEW_VALUES = 16  # as many can be tried one by one
FIXED = ("compute", "tracking", "name", "evaluation")  # have no part in the numbers, or in what all are judged by
TASK_ACCURACY = "accuracy/"
Pair = Annotated[tuple[float, float], Field(strict=False)]
WholePair = Annotated[tuple[int, int], Field(strict=False)]


class Domain(StrictModel):
    """Where one value is looked for: exactly one of the fields."""

    uniform: Pair | None = Field(None, description="[low, high]: any number between them")
    log_uniform: Pair | None = Field(None, description="[low, high]: any number, small ones as likely as large ones")
    integer: WholePair | None = Field(None, description="[low, high]: any whole number, both ends included")
    log_integer: WholePair | None = Field(None, description="[low, high]: as integer, small ones as likely as large")
    choice: TupleOf[Any] | None = Field(None, min_length=1, description="One of these values, whatever they are")

    @model_validator(mode="after")
    def _is_one(self) -> "Domain":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"found {found}, expected exactly one of {', '.join(type(self).model_fields)}")
        if self.choice is None:
            low, high = self.ends
            if low >= high:
                raise ValueError(f"{given[0]} is [{low:g}, {high:g}], expected a low end below the high one")
            if given[0].startswith("log_") and low <= 0:
                raise ValueError(f"{given[0]} begins at {low:g}, expected an end above 0")
        elif len(set(map(_written, self.choice))) < len(self.choice):
            raise ValueError(f"choice names a value twice ({list(self.choice)!r}), expected each once")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """What is checked before anything starts: both ends of a range, each value of a choice."""
        return self.choice or self.uniform or self.log_uniform or self.integer or self.log_integer or ()

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values, where they are few."""
        if self.choice is not None:
            return self.choice
        whole = self.integer or self.log_integer
        if whole is None or whole[1] - whole[0] >= FEW_VALUES:
            return None
        return tuple(range(whole[0], whole[1] + 1))

    @property
    def codes(self) -> tuple[str | int | float | bool | None, ...]:
        """A choice's values as samplers take them: what is no plain value is written down."""
        return tuple(map(self.code, self.choice or ()))

    @staticmethod
    def code(value: Any) -> str | int | float | bool | None:
        """A value as a sampler takes it."""
        plain = value is None or isinstance(value, str | int | float | bool)
        return value if plain else _written(value)

    def meant(self, code: Any) -> Any:
        """The value that a sampler's suggestion stands for."""
        for value in self.choice or ():
            if self.code(value) == code and type(self.code(value)) is type(code):
                return value
        return code

    @property
    def is_log(self) -> bool:
        """Whether small values are as likely as large ones."""
        return self.log_uniform is not None or self.log_integer is not None


class EarlyStopping(ShorthandModel):
    """When a trial that does badly is given up; a rung is a finished stage. A bare kind will do."""

    main_field: ClassVar[str] = "kind"

    kind: Literal["asha", "median"] = Field(
        description="asha: below the best share of those that came as far; median: below the median of their means"
    )
    grace_stages: PositiveInt = Field(1, description="Stages that every trial may finish")
    reduction_factor: PositiveInt = Field(2, ge=2, description="asha: one in so many goes on at a rung")


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Search(StrictModel):
    """What is searched, by which figure, and how."""

    domains: dict[str, Domain] = Field(min_length=1, description="By dotted path of the recipe")
    objectives: Annotated[TupleOf[str], BeforeValidator(_several, json_schema_input_type=str | list[str])] = Field(
        ("transfer",),
        min_length=1,
        description=f"Figures of the accuracy matrix ({', '.join(Metrics.model_fields)}), or accuracy/TASK after the "
        "last stage; of several, the front of the best compromises is found",
    )
    sampler: Literal["tpe", "random", "grid", "nsga2"] = Field(
        "tpe", description="Optuna's; nsga2: for several objectives; grid: every combination of values"
    )
    trials: PositiveInt | None = Field(None, description="How many; grid: all combinations")
    batch: PositiveInt = Field(
        4,
        description="Trials suggested before any of them is heard of, so that the suggestions do not depend on which "
        "one is finished first",
    )
    early_stopping: EarlyStopping | None = Field(None, description="Give up trials that do badly; one objective")
    validation_share: float = Field(
        0.2, gt=0, lt=1, description="Of every task's training images, held out to judge by: test images are not seen"
    )
    seed: NonNegativeInt = Field(0, description="Of the sampler and of what is held out")
    root: str | None = Field(None, description="Folder that relative paths count from; default: the current one")
    keep_models: Literal["all", "chosen"] = Field("all", description="chosen: the others' weights go at the end")

    @model_validator(mode="after")
    def _fits_together(self) -> "Search":
        for path in self.domains:
            if path.split(".")[0] in FIXED:
                raise ValueError(f"domains.{path}: expected no field of {', '.join(FIXED)}: it is the same for all")
        for objective in self.objectives:
            if objective not in Metrics.model_fields and not objective.startswith(TASK_ACCURACY):
                raise ValueError(
                    f"objectives: found {objective!r}, which no metric has, expected "
                    f"{', '.join(Metrics.model_fields)} or {TASK_ACCURACY}TASK"
                )
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives: found {', '.join(self.objectives)}, expected each once")
        if self.sampler == "grid":
            self._check_grid()
        elif self.trials is None:
            raise ValueError(f"trials: found none with sampler {self.sampler}, expected how many, at least 1")
        if self.sampler == "nsga2" and len(self.objectives) == 1:
            raise ValueError("sampler is nsga2 with one objective, expected several (or tpe)")
        if self.early_stopping and len(self.objectives) > 1:
            raise ValueError("early_stopping with several objectives, expected one to rank trials by, or none")
        return self

    def _check_grid(self) -> None:
        if self.trials is not None:
            raise ValueError(f"trials is {self.trials} with sampler grid, expected none: all combinations are tried")
        for path, domain in self.domains.items():
            if domain.values is None:
                raise ValueError(
                    f"domains.{path}: expected a choice or at most {FEW_VALUES} whole numbers with sampler grid"
                )

    def fingerprint(self, base: str) -> str:
        """Identify the search of a base experiment. Returns 16 hexadecimal digits.

        Args:
            base: fingerprint of the experiment as it is, judged on what is held out.
        """
        identity = [base, self.model_dump(mode="json", exclude={"keep_models", "root"})]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def direction_of(objective: str) -> Literal["min", "max"]:
    """Which way an objective is better."""
    return "min" if objective == "forgetting" else "max"


def objectives_of(names: Sequence[str], metrics: Metrics, row: Mapping[str, float]) -> dict[str, float]:
    """The objectives' values.

    Args:
        names: of the objectives.
        metrics: of the rows so far; what is undefined yet counts as 0, for all trials alike.
        row: the last row, by task.
    """
    return {
        name: row[name.removeprefix(TASK_ACCURACY)] if name.startswith(TASK_ACCURACY) else getattr(metrics, name) or 0.0
        for name in names
    }


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


class Trial(StrictModel):
    """One trial of a search."""

    number: PositiveInt
    values: dict[str, Any] = Field(description="By dotted path of the recipe")
    status: Literal["finished", "read", "stopped", "failed"] = Field(
        description="read: finished before, in this search or one beside it; stopped: given up early"
    )
    reason: RedactedStr = Field("", description="Of a failure")
    fingerprint: str = ""
    folder: str = Field("", description="The run's, from the search's folder")
    stages: NonNegativeInt = Field(0, description="That are finished")
    shared_stages: NonNegativeInt = Field(0, description="Of these, taken from a trial that trained the same")
    objectives: dict[str, float] = Field(default_factory=dict, description="On held-out images, after those stages")
    train_seconds: float = 0.0


class StageTrainings(StrictModel):
    """What became of the stage trainings that a search asked for."""

    asked: NonNegativeInt = Field(description="Trials times stages")
    run: NonNegativeInt
    shared: NonNegativeInt = Field(description="Taken from a trial that trained the same")
    read: NonNegativeInt = Field(description="Of trials that were finished before")
    stopped_early: NonNegativeInt
    failed: NonNegativeInt = Field(description="Of trials that failed")


class SearchResult(StrictModel):
    """`search.json`: what a search found."""

    name: str
    fingerprint: str
    objectives: TupleOf[str]
    held_out_share: float = Field(description="Of each class's training images: the trials are judged on these")
    held_out_seed: int
    trials: TupleOf[Trial]
    front: TupleOf[PositiveInt] = Field(description="Numbers of the trials that no other one beats in all objectives")
    chosen: PositiveInt = Field(description="Of the front, the one with the best mean of the objectives")
    importance: dict[str, float] = Field(description="Share of the objective's variance that a path explains (fANOVA)")
    stage_trainings: StageTrainings
    test: Result = Field(description="The chosen trial's models, judged on the test images, once, at the end")
    warnings: TupleOf[RedactedStr] = ()
    seconds: float = Field(description="Wall time of the last attempt")


class TrialStarted(StrictModel):
    """A trial begins, or goes on."""

    event: Literal["trial_started"] = "trial_started"
    values: dict[str, Any]
    fingerprint: str
    folder: str
    read: bool = Field(description="Whether it was finished before")


class TrialEnded(StrictModel):
    """A trial ends."""

    event: Literal["trial_ended"] = "trial_ended"
    status: Literal["finished", "read", "stopped", "failed", "interrupted"]
    reason: RedactedStr = ""
    stages: NonNegativeInt
    objectives: dict[str, float]


class TrialNews(StrictModel):
    """What a trial reports while a search goes on."""

    trial: NonNegativeInt = Field(description="Its number; 0: the chosen one, judged on the test images")
    news: Annotated[TrialStarted | TrialEnded | Progress, Field(discriminator="event")]
