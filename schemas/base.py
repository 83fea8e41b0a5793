"""Base classes of all schemas, paths in recipes, and the translation of validation errors into `InputError`."""

import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
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

from schemas.errors import MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_PROBLEMS, ErrorCode, InputError, did_you_mean


class StrictModel(BaseModel):
    """Base of all models: instances are immutable, and unknown fields and values of a wrong type are refused.

    NaN is refused, too, unless a field allows it. It is written to JSON as `NaN`.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    @model_validator(mode="before")
    @classmethod
    def _check_field_names(cls, data: Any) -> Any:
        for field in data if isinstance(data, Mapping) else ():
            if field not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_field", "{problem}", {"problem": _unknown_field_message(str(field), cls), "field": field}
                )
        return data


class ShorthandModel(StrictModel):
    """Base class of recipe sections that may be written as a plain string. The string sets the main field.

    For example, `model: embedded` means `model: {name: embedded}`.

    Attributes:
        main_field: The name of the field that the string sets.
    """

    main_field: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, data: Any) -> Any:
        return {cls.main_field: data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Allow a plain string in the JSON schema in place of the mapping, with the values that `main_field` allows."""
        reference = handler(core)
        section = handler.resolve_ref_schema(reference)
        main = section["properties"][cls.main_field]
        shorthand = next(
            (option for option in main.get("anyOf", []) if option.get("type") == "string"), {"type": "string"}
        )
        section |= {"anyOf": [shorthand, dict(section)]}
        for field in section.keys() - {"anyOf", "description", "title"}:
            del section[field]
        return reference


def _unknown_field_message(field: str, model: type[BaseModel]) -> str:
    allowed = model.model_fields
    parents = [
        name for name, info in allowed.items() if any(field in section.model_fields for section in _sections(info))
    ]
    hint = (
        f"; did you mean '{parents[0]}.{field}'? Then indent it below '{parents[0]}:'"
        if parents
        else did_you_mean(field, allowed) or "; allowed: " + ", ".join(allowed)
    )
    return f"unknown field {_shorten(field)}{hint}"


def _sections(info: FieldInfo) -> list[type[BaseModel]]:
    """Return the pydantic model classes that a field's type annotation allows."""
    annotations = (info.annotation, *get_args(info.annotation)) if get_origin(info.annotation) is not tuple else ()
    return [option for option in annotations if isinstance(option, type) and issubclass(option, BaseModel)]


@dataclass(frozen=True)
class Problem:
    """One problem that the validation of a model found.

    Attributes:
        field: The dotted path of the wrong field; empty if the problem concerns several fields of the top-level model.
        message: The message for the user, on one line: the field, what was found and what was expected.
        code: The kind of mistake.
    """

    field: str
    message: str
    code: ErrorCode


def list_problems(error: ValidationError) -> list[Problem]:
    """Convert the errors of a failed validation to problems, in the order of the fields.

    Args:
        error: The error that pydantic raised.

    Returns:
        All problems. If a list has invalid items, pydantic also reports that the list is too short; that report is
        omitted.
    """
    details = error.errors(include_url=False)
    locations = [detail["loc"] for detail in details]

    def has_wrong_items(location: tuple[int | str, ...]) -> bool:
        return any(other[:-1] and other[: len(location)] == location and other != location for other in locations)

    return [
        Problem(_field(detail), _message(detail), _code(detail))
        for detail in details
        if detail["type"] != "too_short" or not has_wrong_items(detail["loc"])
    ]


def explain(error: ValidationError) -> str:
    """Format the message for a failed validation: one line per problem. At most `MAX_PROBLEMS` problems are listed."""
    problems = list_problems(error)
    lines = list(dict.fromkeys(problem.message for problem in problems[:MAX_PROBLEMS]))
    more = [f"and {len(problems) - MAX_PROBLEMS} more problems"] if len(problems) > MAX_PROBLEMS else []
    return "\n".join([*lines, *more])


def input_error(error: ValidationError, message: str = "", field: str = "") -> InputError:
    """Build the `InputError` that reports a failed validation to the user.

    Args:
        error: The error that pydantic raised.
        message: The message of the new error; default: `explain(error)`.
        field: The recipe field or command-line option that is wrong; default: the field of the first problem.

    Returns:
        An error with the code of the first problem. The caller raises it `from error`.
    """
    first = list_problems(error)[0]
    return InputError(message or explain(error), code=first.code, field=field or first.field or None)


Schema = TypeVar("Schema", bound=BaseModel)


def parse_json(schema: type[Schema], text: str | bytes, source: object, advice: str) -> Schema:
    """Parse JSON that this program has written.

    Args:
        schema: The pydantic model class of the content.
        text: The JSON.
        source: The file or object that contains the JSON; named in the error message.
        advice: What the user can do if the JSON is damaged; appended to the error message.

    Returns:
        The validated content.

    Raises:
        InputError: The text is not JSON, or does not match the schema.
    """
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        reason = "; ".join(
            ": ".join(filter(None, (".".join(map(str, detail["loc"])), detail["msg"]))) for detail in details
        )
        message = f"{source}: found a damaged file ({reason}), expected an unchanged one; {advice}"
        raise InputError(message, code=ErrorCode.UNREADABLE) from error


def _raised_error(detail: Any) -> InputError | None:
    """Return the `InputError` that a validator raised; `None` if pydantic itself found the error.

    Args:
        detail: One item of `ValidationError.errors()`.
    """
    raised = detail.get("ctx", {}).get("error")
    return raised if isinstance(raised, InputError) else None


def _field(detail: Any) -> str:
    parts = [str(part)[:MAX_NAME_BYTES] for part in detail["loc"]]
    if detail["type"] == "unknown_field":
        parts.append(str(detail["ctx"]["field"])[:MAX_NAME_BYTES])
    elif (raised := _raised_error(detail)) and raised.field:
        parts.append(raised.field)
    return ".".join(parts)


def _code(detail: Any) -> ErrorCode:
    if raised := _raised_error(detail):
        return raised.code
    return _CODES.get(detail["type"], ErrorCode.INVALID_VALUE)


def _message(detail: Any) -> str:
    field = ".".join(str(part)[:MAX_NAME_BYTES] for part in detail["loc"]) or "the recipe"
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in ("unknown_field", "value_error"):
        return f"{field}: {detail['msg'].removeprefix('Value error, ')}"
    if kind == "missing":
        return f"{field}: found nothing, expected a value"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        if _NUMBER.fullmatch(value):
            return f"{field}: found {_shorten(value)} in quotes, expected a number without quotes"
        if _DECIMAL_COMMA.fullmatch(value):
            return f"{field}: found {_shorten(value)}, expected a decimal point: {value.replace(',', '.')}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"{field}: found {_shorten(value)}, expected a whole number: {int(value)}"
    if kind == "string_type" and value is not None and not isinstance(value, list | dict):
        return f"{field}: found {value}, expected a text: put it in quotes"
    expected = _EXPECTED.get(kind) or _PYDANTIC_PHRASES.sub("", detail["msg"])
    if kind.startswith(("greater_", "less_")):
        expected = f"a value {expected}"
    if kind == "string_pattern_mismatch" and (match := _CHARACTERS_PATTERN.fullmatch(context["pattern"])):
        expected = f"only letters, digits and any of {match[1]}"
    hint = did_you_mean(str(value), re.findall(r"'([^']*)'", expected)) if kind == "literal_error" else ""
    return f"{field}: found {'nothing' if value is None else _shorten(value)}, expected {expected}{hint}"


_CODES = {"unknown_field": ErrorCode.UNKNOWN_NAME, "missing": ErrorCode.MISSING_VALUE}
# Pydantic's messages use Python's type names. Readers of a recipe know YAML's.
_EXPECTED = {
    "tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping of fields to values",
    "model_type": "a mapping of fields to values", "model_attributes_type": "a mapping of fields to values",
    "bool_type": "true or false",
}  # fmt: skip
_PYDANTIC_PHRASES = re.compile(r"^\w+ should (?:be|have|match) | after validation, not \d+$")
_CHARACTERS_PATTERN = re.compile(r"\^\[A-Za-z0-9(.*)\]\*\$")
_NUMBER = re.compile(r"\s*[+-]?[0-9][0-9_]*(\.[0-9]*)?([eE][+-]?[0-9]+)?\s*")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?")
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 120
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 6
_repr.maxlevel = 3


def _shorten(value: object) -> str:
    """Return the `repr` of a value, shortened for a message."""
    return _repr.repr(value)


T = TypeVar("T")
# YAML and JSON have lists only. The models store tuples, because they are immutable.
TupleOf = Annotated[tuple[T, ...], Field(strict=False)]

Share = Annotated[float, Field(ge=0, lt=1)]


def string_to_list(value: Any) -> Any:
    """Convert a string to a list of one string, for fields that accept both. Other values are returned unchanged."""
    return [value] if isinstance(value, str) else value


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", flags=re.ASCII)


def expand_path(location: str, root: Path | None = None) -> str:
    """Expand `~` and environment variables (`$NAME`, `${NAME}`) in a path.

    If a path with `$` exists literally, it is returned unchanged. In a URL, variables that are not set are preserved.

    Args:
        location: A path, a glob pattern, or a URL.
        root: The folder that relative paths are relative to; default: the current folder.

    Returns:
        The expanded path or URL.

    Raises:
        ValueError: A variable in a path is not set, or the user of `~user` does not exist.
    """
    is_url = "://" in location
    if not is_url and "$" in location and os.path.lexists(Path(root or "", location)):
        return location

    def expand_variable(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ and not is_url:
            raise ValueError(
                f"found {_shorten(location)}, but the environment variable {name} is not set; set it, or write "
                "the path without it"
            )
        return os.environ.get(name, match[0])

    expanded = _VARIABLE.sub(expand_variable, location)
    try:
        return expanded if is_url or not expanded.startswith("~") else str(Path(expanded).expanduser())
    except RuntimeError as error:  # `~user` of a user that does not exist
        raise ValueError(f"found {_shorten(location)}, expected the home of an existing user ({error})") from error


def resolve_location(location: str, info: ValidationInfo) -> str:
    """Validate a path or URL, expand it, and make a relative path absolute.

    Args:
        location: A path, a glob pattern, or a URL.
        info: Pydantic's information about the validation. Its context may contain `root`, the folder that relative
            paths are relative to. Without `root`, the location is validated and returned unchanged.

    Returns:
        The URL, or the absolute path.

    Raises:
        ValueError: The path is empty, too long for a file system, or has unprintable characters, or it cannot be
            expanded.
    """
    if not location.strip():
        raise ValueError("found an empty path, expected a file, a folder or a URL")
    if not location.isprintable():
        raise ValueError(f"found {_shorten(location)}, expected a path or a URL of printable characters")
    root = (info.context or {}).get("root")
    if root is not None:
        location = expand_path(location, Path(root))
    if "://" in location:
        return location
    too_long = any(len(part.encode()) > MAX_NAME_BYTES for part in Path(location).parts)
    if too_long or len(location.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"found {_shorten(location)}, expected a path that a file system accepts")
    return location if root is None else str(Path(root) / location)


# A file, folder, glob, brace range or URL. Relative paths are relative to the current folder of the command. `~` and
# environment variables are expanded.
Location = Annotated[str, AfterValidator(resolve_location)]
