"""The recipe section `search` and the results of a hyperparameter search: domains, objectives, sampler, trials."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from schemas.base import ShorthandModel, StrictModel, TupleOf, string_to_list
from schemas.errors import ErrorCode, InputError
from schemas.events import RunEvent
from schemas.results import Metrics, RedactedStr, Result

MAX_GRID_VALUES = 16  # an integer range with more values is not enumerated
FIXED_SECTIONS = ("compute", "tracking", "name", "evaluation")  # the same for all trials
TASK_ACCURACY_PREFIX = "accuracy/"
FloatPair = Annotated[tuple[float, float], Field(strict=False)]
IntPair = Annotated[tuple[int, int], Field(strict=False)]


class Domain(StrictModel):
    """The search space of one recipe field. Exactly one of the settings must be set."""

    uniform: FloatPair | None = Field(None, description="[low, high]: any number between them")
    log_uniform: FloatPair | None = Field(
        None, description="[low, high]: any number between them, uniform in the logarithm"
    )
    integer: IntPair | None = Field(None, description="[low, high]: any integer, both ends included")
    log_integer: IntPair | None = Field(None, description="[low, high]: any integer, uniform in the logarithm")
    choice: TupleOf[Any] | None = Field(None, min_length=1, description="One of these values, of any type")

    @model_validator(mode="after")
    def _check_bounds(self) -> "Domain":
        kinds = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"found {' and '.join(kinds) or 'none'}, expected exactly one of {', '.join(type(self).model_fields)}"
            )
        kind = kinds[0]
        if self.choice is None:
            low, high = self.values_to_check
            if low >= high:
                raise InputError(
                    f"{kind} is [{low:g}, {high:g}], expected a low bound below the high bound",
                    code=ErrorCode.INVALID_VALUE,
                    field=kind,
                )
            if self.is_log and low <= 0:
                raise InputError(
                    f"{kind}: the low bound is {low:g}, expected a value above 0",
                    code=ErrorCode.INVALID_VALUE,
                    field=kind,
                )
        elif len(set(map(_to_json, self.choice))) < len(self.choice):
            raise InputError(
                f"choice contains a value twice ({list(self.choice)!r}), expected different values",
                code=ErrorCode.DUPLICATE,
                field=kind,
            )
        return self

    @property
    def values_to_check(self) -> tuple[Any, ...]:
        """Values that must be valid before the search starts: both ends of a range, or all values of a choice."""
        return self.choice or self.uniform or self.log_uniform or self.integer or self.log_integer or ()

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values of a choice or of a range of at most `MAX_GRID_VALUES` integers; else `None`."""
        if self.choice is not None:
            return self.choice
        bounds = self.integer or self.log_integer
        if bounds is None or bounds[1] - bounds[0] >= MAX_GRID_VALUES:
            return None
        return tuple(range(bounds[0], bounds[1] + 1))

    @property
    def encoded_choices(self) -> tuple[str | int | float | bool | None, ...]:
        """The values of `choice`, encoded for samplers by `encode`."""
        return tuple(map(self.encode, self.choice or ()))

    @staticmethod
    def encode(value: Any) -> str | int | float | bool | None:
        """Encode a value for a sampler, which accepts only scalars. Lists and mappings are converted to JSON."""
        is_scalar = value is None or isinstance(value, str | int | float | bool)
        return value if is_scalar else _to_json(value)

    def decode(self, code: Any) -> Any:
        """Return the value of the domain for a sampler's suggestion; the inverse of `encode`."""
        for value in self.choice or ():
            if self.encode(value) == code and type(self.encode(value)) is type(code):
                return value
        return code

    @property
    def is_log(self) -> bool:
        """Whether values are sampled uniformly in the logarithm."""
        return self.log_uniform is not None or self.log_integer is not None


class EarlyStopping(ShorthandModel):
    """Early stopping of trials.

    Trials are compared after each finished stage, which is a rung in the terms of ASHA. A plain string in place of the
    section is the kind.
    """

    main_field: ClassVar[str] = "kind"

    kind: Literal["asha", "median"] = Field(
        description="asha: stop a trial that is not among the best trials at a rung; median: stop a trial below the "
        "median of the other trials' means"
    )
    grace_stages: PositiveInt = Field(1, description="Stages that every trial may finish")
    reduction_factor: PositiveInt = Field(2, ge=2, description="asha: at a rung, one of this many trials continues")


class Search(StrictModel):
    """The recipe section `search`: domains, objectives, sampler and number of trials."""

    domains: dict[str, Domain] = Field(min_length=1, description="Search spaces, by dotted recipe field")
    objectives: Annotated[TupleOf[str], BeforeValidator(string_to_list, json_schema_input_type=str | list[str])] = (
        Field(
            ("transfer",),
            min_length=1,
            description=f"Metrics of the accuracy matrix ({', '.join(Metrics.model_fields)}), or accuracy/TASK after "
            "the last stage; several objectives give a Pareto front",
        )
    )
    sampler: Literal["tpe", "random", "grid", "nsga2"] = Field(
        "tpe", description="Optuna sampler; nsga2: for several objectives; grid: every combination of values"
    )
    trials: PositiveInt | None = Field(None, description="Number of trials; grid: all combinations")
    batch: PositiveInt = Field(
        4,
        description="Trials that are suggested together, before any of their results is known, so that suggestions do "
        "not depend on the order in which trials finish",
    )
    early_stopping: EarlyStopping | None = Field(None, description="Stop bad trials early; needs a single objective")
    validation_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Fraction of each task's training images that is held out, to evaluate trials without test images",
    )
    seed: NonNegativeInt = Field(0, description="Seed of the sampler and of the held-out images")
    root: str | None = Field(
        None, description="Folder that relative paths are relative to; default: the current folder"
    )
    keep_models: Literal["all", "chosen"] = Field(
        "all", description="chosen: at the end, delete the weights of all other trials"
    )

    @model_validator(mode="after")
    def _check_consistency(self) -> "Search":
        for path in self.domains:
            if path.split(".")[0] in FIXED_SECTIONS:
                raise InputError(
                    f"domains.{path}: fields of {', '.join(FIXED_SECTIONS)} cannot be searched, because they are the "
                    "same for all trials",
                    code=ErrorCode.CONFLICT,
                    field=f"domains.{path}",
                )
        for objective in self.objectives:
            if objective not in Metrics.model_fields and not objective.startswith(TASK_ACCURACY_PREFIX):
                raise InputError(
                    f"objectives: found {objective!r}, expected one of {', '.join(Metrics.model_fields)}, or "
                    f"{TASK_ACCURACY_PREFIX}TASK",
                    code=ErrorCode.UNKNOWN_NAME,
                    field="objectives",
                )
        if len(set(self.objectives)) < len(self.objectives):
            raise InputError(
                f"objectives: found {', '.join(self.objectives)}, expected different objectives",
                code=ErrorCode.DUPLICATE,
                field="objectives",
            )
        self._check_sampler()
        if self.early_stopping and len(self.objectives) > 1:
            raise InputError(
                "early_stopping needs a single objective to rank trials. Give one objective, or remove early_stopping",
                code=ErrorCode.CONFLICT,
                field="early_stopping",
            )
        return self

    def _check_sampler(self) -> None:
        if self.sampler == "grid":
            self._check_grid()
        elif self.trials is None:
            raise InputError(
                f"trials: found none, expected the number of trials, which the sampler {self.sampler} needs",
                code=ErrorCode.MISSING_VALUE,
                field="trials",
            )
        if self.sampler == "nsga2" and len(self.objectives) == 1:
            raise InputError(
                "the sampler nsga2 needs several objectives. For one objective, use tpe",
                code=ErrorCode.CONFLICT,
                field="sampler",
            )

    def _check_grid(self) -> None:
        if self.trials is not None:
            raise InputError(
                f"trials is {self.trials}, but the sampler grid tries all combinations. Remove trials",
                code=ErrorCode.CONFLICT,
                field="trials",
            )
        for path, domain in self.domains.items():
            if domain.values is None:
                raise InputError(
                    f"domains.{path}: the sampler grid needs a choice or a range of at most {MAX_GRID_VALUES} integers",
                    code=ErrorCode.CONFLICT,
                    field=f"domains.{path}",
                )

    def fingerprint(self, experiment_fingerprint: str) -> str:
        """Return a hash of the search and its experiment.

        Args:
            experiment_fingerprint: The fingerprint of the experiment in which no domain's value is set, and which is
                evaluated on held-out images.

        Returns:
            16 hexadecimal digits.
        """
        identity = [experiment_fingerprint, self.model_dump(mode="json", exclude={"keep_models", "root"})]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def optimisation_direction(objective: str) -> Literal["min", "max"]:
    """Return whether a search minimises or maximises an objective."""
    return "min" if objective == "forgetting" else "max"


def objective_values(names: Sequence[str], metrics: Metrics, row: Mapping[str, float]) -> dict[str, float]:
    """Return the values of a search's objectives after a stage.

    Args:
        names: The names of the objectives: metrics, or `accuracy/TASK`.
        metrics: The metrics of the accuracy matrix after the stage. An undefined metric counts as 0.
        row: The accuracy of the stage's model by task.

    Returns:
        The value of each objective, by name.
    """
    return {
        name: row[name.removeprefix(TASK_ACCURACY_PREFIX)]
        if name.startswith(TASK_ACCURACY_PREFIX)
        else getattr(metrics, name) or 0.0
        for name in names
    }


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


class Trial(StrictModel):
    """One trial of a search: its values, status and results."""

    number: PositiveInt
    values: dict[str, Any] = Field(description="Values, by dotted recipe field")
    status: Literal["finished", "read", "stopped", "failed"] = Field(
        description="read: the same run had already finished, so its results were read; stopped: by early stopping"
    )
    reason: RedactedStr = Field("", description="Reason of a failure")
    fingerprint: str = ""
    folder: str = Field("", description="The run's folder, relative to the search's folder")
    stages: NonNegativeInt = Field(0, description="Finished stages")
    shared_stages: NonNegativeInt = Field(0, description="Finished stages that another trial had trained")
    objectives: dict[str, float] = Field(
        default_factory=dict, description="Objectives on held-out images, after the finished stages"
    )
    train_seconds: float = 0.0


class StageTrainings(StrictModel):
    """Numbers of stages in a search, by outcome: trained, reused, read, stopped or failed."""

    asked: NonNegativeInt = Field(description="Number of trials times number of stages")
    run: NonNegativeInt
    shared: NonNegativeInt = Field(description="Reused from another trial with the same training")
    read: NonNegativeInt = Field(description="Stages of trials that had finished earlier")
    stopped_early: NonNegativeInt
    failed: NonNegativeInt = Field(description="Stages of trials that failed")


class SearchResult(StrictModel):
    """The content of `search.json`: the results of a search."""

    name: str
    fingerprint: str
    objectives: TupleOf[str]
    held_out_share: float = Field(description="Fraction of each class's training images on which trials are evaluated")
    held_out_seed: int
    trials: TupleOf[Trial]
    front: TupleOf[PositiveInt] = Field(description="Pareto front: numbers of the trials that no other trial dominates")
    chosen: PositiveInt = Field(description="The trial of the front with the best mean of the objectives")
    importance: dict[str, float] = Field(
        description="Fraction of the objective's variance that a domain explains (fANOVA)"
    )
    stage_trainings: StageTrainings
    test: Result = Field(description="Result of the chosen trial on the test images")
    warnings: TupleOf[RedactedStr] = ()
    seconds: float = Field(description="Wall time of the last attempt")


class TrialStarted(StrictModel):
    """A trial starts or resumes."""

    event: Literal["trial_started"] = "trial_started"
    values: dict[str, Any]
    fingerprint: str
    folder: str
    read: bool = Field(description="Whether the trial had already finished")


class TrialEnded(StrictModel):
    """A trial ends, for the reason in `status`."""

    event: Literal["trial_ended"] = "trial_ended"
    status: Literal["finished", "read", "stopped", "failed", "interrupted"]
    reason: RedactedStr = ""
    stages: NonNegativeInt
    objectives: dict[str, float]


class TrialEvent(StrictModel):
    """An event of a running trial."""

    trial: NonNegativeInt = Field(
        description="The trial's number; 0: the evaluation of the chosen trial on the test images"
    )
    news: Annotated[TrialStarted | TrialEnded | RunEvent, Field(discriminator="event")]
