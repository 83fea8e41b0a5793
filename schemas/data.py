"""A task, and the reference set that is only distilled on."""

import re
import unicodedata
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from schemas.base import Location, ShorthandModel, TupleOf

RESERVED_NAMES = (
    "method", "seed", "run", "transfer", "avg", "last", "forgetting", "backward_transfer", "forward_transfer",
)  # fmt: skip


_NAME = re.compile(r"^[A-Za-z0-9_.-]*$")
LONGEST_TASK_NAME = 100  # characters: stages' folders and metrics are named after tasks


def name_of_folder(path: str) -> str:
    """A task's default name: its folder's, as far as a name may hold it.

    Raises:
        ValueError: there is no letter or digit in it.
    """
    folder = PurePosixPath(path).name
    if "://" in path:  # user information and a query may be secrets: they are no part of a name
        url = urlsplit(path)
        folder = PurePosixPath(url.path).name or url.hostname or ""
    if _NAME.fullmatch(folder) and len(folder) <= LONGEST_TASK_NAME:
        return folder
    letters = "".join(sign for sign in unicodedata.normalize("NFKD", folder) if not unicodedata.combining(sign))
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", letters).strip("-")[:LONGEST_TASK_NAME]
    if not name:
        raise ValueError(f"found the folder {folder!r}, which makes no task's name, expected name: beside path:")
    return name


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Task(ShorthandModel):
    """One task of the sequence: a folder in the layout of CLIP_benchmark. In a recipe, a bare path will do."""

    main_field: ClassVar[str] = "path"

    path: Location = Field(
        description="Folder with classnames.txt, zeroshot_classification_templates.txt, train/ and test/"
    )
    name: str = Field(
        "",
        description="Default: the folder's name, with a - for whatever may not be in a name",
        pattern=_NAME.pattern,
        max_length=LONGEST_TASK_NAME,
    )
    learning_rate: PositiveFloat | None = Field(None, description="Instead of optimisation.learning_rate in this stage")
    steps: PositiveInt | None = Field(None, description="Instead of optimisation.steps in this stage")
    classes: TupleOf[NonNegativeInt] | None = Field(
        None, min_length=1, description="Only these labels of the folder, in this order; default: all"
    )
    shots: PositiveInt | None = Field(
        None, description="Train on so many images of each class alone, drawn by the recipe's seed; default: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_folder(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"path": data}
        if isinstance(data, dict) and isinstance(data.get("path"), str) and not data.get("name"):
            return {**data, "name": name_of_folder(data["path"])}
        return data


class ClassIncremental(ShorthandModel):
    """One dataset, its classes learnt a group a stage and told apart by one head. A bare path will do."""

    main_field: ClassVar[str] = "path"

    path: Location = Field(description="The dataset: a task folder")
    first: PositiveInt = Field(10, description="Classes of the first stage")
    increment: PositiveInt = Field(10, description="Classes of each further stage")
    order: NonNegativeInt | Location = Field(
        0,
        description="Order of the classes: a seed, or a file of class names (also where they are numbers) or of "
        "labels, one a line",
    )
    epochs: PositiveInt = Field(1, description="Times a stage sees its images")
    template: str | None = Field(None, description="The one prompt, with {c}; default: the folder's first template")

    @model_validator(mode="after")
    def _has_a_place_for_the_class(self) -> "ClassIncremental":
        if self.template is not None and "{c}" not in self.template:
            raise ValueError(f"found the template {self.template!r}, expected a {{c}} for the class name in it")
        return self


class Reference(ShorthandModel):
    """Unlabelled images and unpaired texts. In a recipe, a bare path will do for a folder that holds both."""

    main_field: ClassVar[str] = "images"

    images: Annotated[TupleOf[Location], BeforeValidator(_several)] = Field(
        min_length=1,
        description="Shards (paths, globs, brace ranges, URLs) or folders of shards or of image files",
    )
    texts: Location | None = Field(
        None,
        description="Caption file: one a line, or TSV, CSV, JSON with one column or key of captions; default: "
        "captions.txt or the .txt members beside the images",
    )
    max_texts: PositiveInt | None = Field(None, description="Use only the first so many texts")


def check_names(tasks: tuple[Task, ...]) -> None:
    """Refuse two tasks of one name: rows, stages and metrics are told apart by it."""
    names = [task.name for task in tasks]
    for name in names:
        if name in RESERVED_NAMES:
            raise ValueError(f"tasks: found the name {name!r}, expected another: comparisons have a column of it")
        if not name:
            raise ValueError("tasks: found an empty name, expected a name or a path that ends in one")
        if names.count(name) > 1:
            raise ValueError(f"tasks: found the name {name!r} twice, expected every task to have its own")
