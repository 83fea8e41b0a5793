"""The recipe sections of data: tasks, class-incremental datasets and the reference set for distillation."""

import re
import unicodedata
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from schemas.base import Location, ShorthandModel, TupleOf, string_to_list
from schemas.errors import ErrorCode, InputError

# Names that a task cannot have: a comparison has these columns and one column per task.
RESERVED_NAMES = (
    "method", "seed", "run", "transfer", "avg", "last", "forgetting", "backward_transfer", "forward_transfer",
)  # fmt: skip


_NAME = re.compile(r"^[A-Za-z0-9_.-]*$")
MAX_TASK_NAME_LENGTH = 100  # characters: folders of stages and names of metrics contain the task's name


def default_task_name(path: str) -> str:
    """Derive a task's name from its folder. Characters other than letters, digits, `_`, `.` and `-` become `-`.

    Args:
        path: The task's folder or URL.

    Returns:
        The name, at most `MAX_TASK_NAME_LENGTH` characters long.

    Raises:
        InputError: The folder's name contains no letter or digit.
    """
    folder = PurePosixPath(path).name
    if "://" in path:  # the user information and the query of a URL may be secrets, so they are not part of the name
        url = urlsplit(path)
        folder = PurePosixPath(url.path).name or url.hostname or ""
    if _NAME.fullmatch(folder) and len(folder) <= MAX_TASK_NAME_LENGTH:
        return folder
    without_accents = "".join(
        character for character in unicodedata.normalize("NFKD", folder) if not unicodedata.combining(character)
    )
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", without_accents).strip("-")[:MAX_TASK_NAME_LENGTH]
    if not name:
        raise InputError(
            f"no task name can be derived from the folder {folder!r}; add name: to the task",
            code=ErrorCode.MISSING_VALUE,
            field="name",
        )
    return name


class Task(ShorthandModel):
    """One task of the sequence: a folder in the layout of CLIP_benchmark.

    A plain string in place of the section is the path.
    """

    main_field: ClassVar[str] = "path"

    path: Location = Field(
        description="Folder with classnames.txt, zeroshot_classification_templates.txt, train/ and test/"
    )
    name: str = Field(
        "",
        description="Default: the folder's name, with - in place of characters that are not allowed",
        pattern=_NAME.pattern,
        max_length=MAX_TASK_NAME_LENGTH,
    )
    learning_rate: PositiveFloat | None = Field(None, description="Overrides optimisation.learning_rate in this stage")
    steps: PositiveInt | None = Field(None, description="Overrides optimisation.steps in this stage")
    classes: TupleOf[NonNegativeInt] | None = Field(
        None, min_length=1, description="Labels of the folder's classes to learn, in this order; default: all"
    )
    shots: PositiveInt | None = Field(
        None, description="Train on this many images of each class, drawn with the recipe's seed; default: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _set_default_name(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"path": data}
        if isinstance(data, dict) and isinstance(data.get("path"), str) and not data.get("name"):
            return {**data, "name": default_task_name(data["path"])}
        return data


class ClassIncremental(ShorthandModel):
    """A dataset whose classes are learnt in groups, one per stage, with one head.

    A plain string in place of the section is the path.
    """

    main_field: ClassVar[str] = "path"

    path: Location = Field(description="The dataset: a task folder")
    first: PositiveInt = Field(10, description="Classes of the first stage")
    increment: PositiveInt = Field(10, description="Classes of each later stage")
    order: NonNegativeInt | Location = Field(
        0,
        description="Order of the classes: a seed, or a file with one class name (which may be a number) or one "
        "label per line",
    )
    epochs: PositiveInt = Field(1, description="Epochs over the images of a stage")
    template: str | None = Field(None, description="The only prompt, with {c}; default: the folder's first template")

    @model_validator(mode="after")
    def _check_template(self) -> "ClassIncremental":
        if self.template is not None and "{c}" not in self.template:
            raise InputError(
                f"found the template {self.template!r}, expected one with {{c}} for the class name",
                code=ErrorCode.INVALID_VALUE,
                field="template",
            )
        return self


class Reference(ShorthandModel):
    """The reference set: unlabelled images and unpaired texts.

    A plain path in place of the section means a folder with both.
    """

    main_field: ClassVar[str] = "images"

    images: Annotated[TupleOf[Location], BeforeValidator(string_to_list)] = Field(
        min_length=1,
        description="Shards (paths, globs, brace ranges, URLs) or folders of shards or of image files",
    )
    texts: Location | None = Field(
        None,
        description="Caption file: one caption per line, or TSV, CSV, JSON with one column or key of captions; "
        "default: captions.txt or the .txt members in the images' folder",
    )
    max_texts: PositiveInt | None = Field(None, description="Use only the first N texts; default: all")


def check_task_names(tasks: tuple[Task, ...]) -> None:
    """Check that tasks' names are unique and not reserved, because folders, columns and metrics are named after them.

    Args:
        tasks: The tasks of a recipe.

    Raises:
        InputError: A name is empty, reserved or not unique.
    """
    names = [task.name for task in tasks]
    for name in names:
        if name in RESERVED_NAMES:
            raise InputError(
                f"tasks: the name {name!r} is reserved for a column of comparisons. Rename the task",
                code=ErrorCode.INVALID_VALUE,
                field="tasks",
            )
        if not name:
            raise InputError(
                "tasks: found an empty name, expected a name or a path that ends in one",
                code=ErrorCode.MISSING_VALUE,
                field="tasks",
            )
        if names.count(name) > 1:
            raise InputError(
                f"tasks: found the name {name!r} twice, expected different names",
                code=ErrorCode.DUPLICATE,
                field="tasks",
            )
