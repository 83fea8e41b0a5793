"""What every schema shares: strictness, the error a user sees, and locations."""

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

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
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from schemas.errors import LONGEST_NAME, LONGEST_PATH, MOST_PROBLEMS, InputError, did_you_mean


class StrictModel(BaseModel):
    """Immutable, no silent conversion, no unknown field. Where a field may be NaN, JSON has it as such."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        for field in data if isinstance(data, Mapping) else ():
            if field not in cls.model_fields:
                raise PydanticCustomError("unknown_field", "{problem}", {"problem": _unknown(str(field), cls)})
        return data


class ShorthandModel(StrictModel):
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


def _unknown(field: str, model: type[BaseModel]) -> str:
    allowed = model.model_fields
    inside = [name for name, info in allowed.items() if any(field in each.model_fields for each in _sections(info))]
    hint = (
        f"; did you mean '{inside[0]}.{field}'? Then indent it below '{inside[0]}:'"
        if inside
        else did_you_mean(field, allowed) or "; allowed: " + ", ".join(allowed)
    )
    return f"unknown field {_short(field)}{hint}"


def _sections(info: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a field may be."""
    annotations = (info.annotation, *get_args(info.annotation)) if get_origin(info.annotation) is not tuple else ()
    return [each for each in annotations if isinstance(each, type) and issubclass(each, BaseModel)]


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
    lines = list(dict.fromkeys(map(_explain_one, real[:MOST_PROBLEMS])))
    more = [f"and {len(real) - MOST_PROBLEMS} more problems"] if len(real) > MOST_PROBLEMS else []
    return "\n".join([*lines, *more])


Content = TypeVar("Content", bound=BaseModel)


def parse_json(kind: type[Content], text: str | bytes, source: object, advice: str) -> Content:
    """Read JSON that this program has written.

    Args:
        kind: of the content.
        text: the JSON.
        source: where it is from, for the sentence.
        advice: what to do where it is damaged.

    Raises:
        InputError: it is no JSON, or of another content.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        reason = "; ".join(": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"]))) for each in problems)
        sentence = f"{source}: found a damaged file ({reason}), expected it as it was written; {advice}"
        raise InputError(sentence) from error


def _explain_one(problem: Any) -> str:
    field = ".".join(str(part)[:LONGEST_NAME] for part in problem["loc"]) or "the recipe"
    kind, found, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind in ("unknown_field", "value_error"):
        return f"{field}: {problem['msg'].removeprefix('Value error, ')}"
    if kind == "missing":
        return f"{field}: found nothing, expected a value"
    if kind in ("int_type", "float_type") and isinstance(found, str):
        if _NUMBER.fullmatch(found):
            return f"{field}: found {_short(found)} in quotes, which make it a text, expected a number without them"
        if _DECIMAL_COMMA.fullmatch(found):
            return f"{field}: found {_short(found)}, expected a decimal point: {found.replace(',', '.')}"
    if kind == "int_type" and isinstance(found, float) and found.is_integer():
        return f"{field}: found {_short(found)}, expected a whole number: {int(found)}"
    if kind == "string_type" and found is not None and not isinstance(found, list | dict):
        return f"{field}: found {found}, expected a text: put it in quotes"
    expected = _EXPECTED.get(kind) or _PYDANTIC_WORDS.sub("", problem["msg"])
    if kind.startswith(("greater_", "less_")):
        expected = f"a value {expected}"
    if kind == "string_pattern_mismatch" and (signs := _ONLY_SIGNS.fullmatch(context["pattern"])):
        expected = f"nothing but letters, digits and any of {signs[1]}"
    hint = did_you_mean(str(found), re.findall(r"'([^']*)'", expected)) if kind == "literal_error" else ""
    return f"{field}: found {'nothing' if found is None else _short(found)}, expected {expected}{hint}"


# What pydantic says, without its own words for what a recipe's reader calls otherwise.
_EXPECTED = {
    "tuple_type": "a list", "list_type": "a list", "dict_type": "fields, each with its value",
    "model_type": "fields, each with its value", "model_attributes_type": "fields, each with its value",
    "bool_type": "true or false",
}  # fmt: skip
_PYDANTIC_WORDS = re.compile(r"^\w+ should (?:be|have|match) | after validation, not \d+$")
_ONLY_SIGNS = re.compile(r"\^\[A-Za-z0-9(.*)\]\*\$")
_NUMBER = re.compile(r"\s*[+-]?[0-9][0-9_]*(\.[0-9]*)?([eE][+-]?[0-9]+)?\s*")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?")
_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 120
_shortener.maxlist = _shortener.maxtuple = _shortener.maxdict = 6
_shortener.maxlevel = 3


def _short(found: object) -> str:
    """What was found, as a sentence can hold it."""
    return _shortener.repr(found)


T = TypeVar("T")
# YAML and JSON only have lists; inside, a sequence is a tuple because nothing here may change.
TupleOf = Annotated[tuple[T, ...], Field(strict=False)]

Share = Annotated[float, Field(ge=0, lt=1)]


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", flags=re.ASCII)


def expand_path(location: str, root: Path | None = None) -> str:
    """Expand `~` and environment variables (`$NAME`, `${NAME}`) in a path; a path that exists as it is stays.

    In a URL, variables that are set are expanded, and everything else stays.

    Args:
        location: a path, a pattern of paths, or a URL.
        root: the folder that relative paths count from; default: the current one.

    Raises:
        ValueError: a variable is not set, or there is no such user.
    """
    is_url = "://" in location
    if not is_url and "$" in location and os.path.lexists(Path(root or "", location)):
        return location

    def value(variable: re.Match[str]) -> str:
        name = variable[1] or variable[2]
        if name not in os.environ and not is_url:
            raise ValueError(
                f"found {_short(location)}, in which the environment variable {name} is not set, expected one that is, "
                "or the path itself"
            )
        return os.environ.get(name, variable[0])

    expanded = _VARIABLE.sub(value, location)
    try:
        return expanded if is_url or not expanded.startswith("~") else str(Path(expanded).expanduser())
    except RuntimeError as error:  # ~someone
        raise ValueError(f"found {_short(location)}, expected the home of a user that there is ({error})") from error


def anchor(location: str, info: ValidationInfo) -> str:
    """Expand variables and `~`, and make a relative path absolute against the context's `root`; URLs stay URLs."""
    if not location.strip():
        raise ValueError("found an empty path, expected a file, a folder or a URL")
    if not location.isprintable():
        raise ValueError(f"found {_short(location)}, expected a path or a URL of printable characters")
    root = (info.context or {}).get("root")
    if root is not None:
        location = expand_path(location, Path(root))
    if "://" in location:
        return location
    if len(location.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in Path(location).parts):
        raise ValueError(f"found {_short(location)}, expected a path that a file system can hold")
    return location if root is None else str(Path(root) / location)


# A file, folder, glob, brace range or URL. Relative paths count from where the command is run; `~` and environment
# variables are expanded.
Location = Annotated[str, AfterValidator(anchor)]
