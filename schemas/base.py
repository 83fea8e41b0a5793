"""What every schema shares: strictness, the error a user sees, and locations."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError


class InputError(ValueError):
    """Something the user gave is wrong: one sentence that names it, what was found and what was expected.

    The command line prints the sentence and exits with code 2. Every other exception is a fault of ours and
    keeps its traceback.
    """


class InterruptedRunError(Exception):
    """A run was stopped from outside. The command line says how to go on and exits with 128 + the signal's number."""

    def __init__(self, how_to_go_on: str, exit_code: int) -> None:
        super().__init__(how_to_go_on)
        self.exit_code = exit_code


class Strict(BaseModel):
    """Immutable, no silent conversion, no unknown field. Where a field may be NaN, JSON has it as such."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        for field in data if isinstance(data, Mapping) else ():
            if field not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_field", "{problem}", {"problem": _unknown(str(field), cls.model_fields)}
                )
        return data


class Abbreviable(Strict):
    """A section that a recipe may give as a bare string: the value of its main field."""

    main_field: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        return {cls.main_field: data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Let an editor accept the bare string, with the same choices as the main field."""
        reference = handler(core)
        section = handler.resolve_ref_schema(reference)
        main = section["properties"][cls.main_field]
        bare = next((option for option in main.get("anyOf", []) if option.get("type") == "string"), {"type": "string"})
        section |= {"anyOf": [bare, dict(section)]}
        for field in section.keys() - {"anyOf", "description", "title"}:
            del section[field]
        return reference


def _unknown(field: str, allowed: Iterable[str]) -> str:
    nearest = get_close_matches(field, allowed, n=1)
    hint = f"did you mean '{nearest[0]}'?" if nearest else "allowed: " + ", ".join(allowed)
    return f"unknown field '{field}'; {hint}"


def explain(error: ValidationError) -> str:
    """One line per problem: the field's dotted path, what is expected, what was found."""
    problems = error.errors(include_url=False)
    # Where the only item of a list is wrong, pydantic also finds the list too short: that is no second problem.
    places = [problem["loc"] for problem in problems]
    real = [
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(
            place[:-1] and place[: len(problem["loc"])] == problem["loc"] and place != problem["loc"]
            for place in places
        )
    ]
    return "\n".join(map(_explain_one, real))


def _explain_one(problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"]) or "the recipe"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("unknown_field", "value_error", "missing"):
        return f"{field}: {message}"
    return f"{field}: {message}, found {problem['input']!r}"


T = TypeVar("T")
# YAML and JSON only have lists; inside, a sequence is a tuple because nothing here may change.
Many = Annotated[tuple[T, ...], Field(strict=False)]

Share = Annotated[float, Field(ge=0, lt=1)]


def anchor(location: str, info: ValidationInfo) -> str:
    """Make a relative path absolute against the context's `root`; leave URLs alone."""
    if not location.strip():
        raise ValueError("found an empty path, expected a file, a folder or a URL")
    root = (info.context or {}).get("root")
    if root is None or "://" in location:
        return location
    return str(Path(root) / Path(location).expanduser())


# A file, folder, glob, brace range or URL. Relative paths count from where the command is run.
Location = Annotated[str, AfterValidator(anchor)]
