"""The reference pages, made from the schemas and the command line.

python docs/reference.py            # writes docs/reference/*.md
python docs/reference.py --check    # exit code 1 where they are not what this would write
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from schemas.experiment import Experiment
from schemas.search import Search

ROOT = Path(__file__).parent.parent
FOLDER, README = ROOT / "docs/reference", ROOT / "README.md"
PACKAGES = {
    "schemas": "WHAT an experiment is: pydantic models, light enough to import in a linter",
    "zscl": "HOW it learns, on torch, open_clip and webdataset alone; runs a sequence in one plain process",
    "orchestrate": "WHERE it runs and what people see of it, on Ray and MLflow",
}
BESIDE = {
    "deploy": "clusters of other kinds than ray_cluster.yaml's",
    "experiments": "recipes, each headed by its command, cost and expected result",
    "examples": "complete ones: own folders, a loss of one's own, results in pandas",
    "benchmarks": "what is claimed about speed, runnable",
    "docs": "the pages that this one points at",
    "tests": "mirrors the packages; clusters and faults of its own",
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
HEAD = """# The recipe, field by field

Made from `schemas/` by `docs/reference.py`. Unknown fields are refused, with the nearest known name; `zscl schema`
gives the same as JSON Schema, for editors. `--set a.b.c=value` overrides any field. Paths count from where the command
is run, but `base` from its own file; `~`, `$NAME` and `${NAME}` are expanded, and a variable that is not set is refused
(in a URL, it is left as it is).
"""


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a recipe, with its dotted path, in the order of the fields."""
    yield path, model
    for name, field in model.model_fields.items():
        for section in models_in(field.annotation):
            yield from sections(section, f"{path}.{name}".lstrip("."))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def allowed(schema: dict[str, Any]) -> str:
    """What a field takes, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(allowed(option) for option in schema["anyOf"]))
    if "$ref" in schema or schema.get("allOf"):
        return "section"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}.get(
        schema.get("type", ""),
        {"array": "list", "object": "mapping", "null": "null"}.get(schema.get("type", ""), "any"),
    )
    limits = [f"{sign} {schema[name]:g}" for name, sign in LIMITS.items() if name in schema]
    return " ".join([kind, ", ".join(limits)]).strip()


def default_of(field: Any) -> str:
    """A field's default, as a recipe would have it."""
    if field.default_factory is not None:
        return "empty"
    if field.default is PydanticUndefined:
        return "**required**"
    if isinstance(field.default, BaseModel):
        return "see there"
    if field.default is None:
        return "null"
    if field.default in ((), ""):
        return "empty"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def recipe() -> str:
    """The page of the recipe's fields."""
    parts = [HEAD]
    for root, title in ((Experiment, "recipe"), (Search, "search")):
        for path, model in sections(root):
            heading = ".".join([*([] if title == "recipe" and path else [title]), *([path] if path else [])])
            schema = model.model_json_schema()
            main = model.model_json_schema().get("$defs", {}).get(model.__name__, schema)
            fields = {**main, **next((each for each in main.get("anyOf", []) if "properties" in each), {})}[
                "properties"
            ]
            text = " ".join((model.__doc__ or "").split())
            rows = [
                f"| `{name}` | {allowed(fields[name])} | {default_of(field)} | {field.description or ''} |"
                for name, field in model.model_fields.items()
            ]
            table = ["| field | takes | default | |", "|---|---|---|---|", *rows]
            parts.append("\n".join([f"## {heading}", "", text, "", *table, ""]))
    return "\n".join(parts)


def commands() -> str:
    """The page of the commands, by typer's own printer."""
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "typer",
            "orchestrate.cli.main",
            "utils",
            "docs",
            "--name",
            "zscl",
            "--title",
            "Commands",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "120", "TERM": "dumb"},
    ).stdout
    return "\n".join(line.rstrip() for line in made.splitlines()).strip() + "\n"


def tree() -> str:
    """The packages' files, each with the first sentence that it says about itself."""
    lines = []
    for package, caption in PACKAGES.items():
        lines.append(f"{package + '/':13} {caption}")
        files = [file for file in sorted((ROOT / package).rglob("*.py")) if file.stem != "__init__"]
        for file in files:
            name = file.relative_to(ROOT / package).with_suffix("").as_posix()
            first = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0]
            sentence = re.split(r"(?<=\w)[.;](?=\s|$)", " ".join(first.split()))[0]
            is_word = sentence[1:2].islower() or sentence[1:2] == " "
            lines.append(f"  {name:20} {sentence[0].lower() if is_word else sentence[0]}{sentence[1:]}")
    return "\n".join(lines + [f"{folder + '/':13} {caption}" for folder, caption in BESIDE.items()])


def readme() -> str:
    """The README with its tree as it is."""
    before, head, rest = README.read_text().partition("## The house\n\n```\n")
    return f"{before}{head}{tree()}\n```{rest.partition('```')[2]}"


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a page is not as it should be"
    )
    check = parser.parse_args().check
    pages = {FOLDER / "recipe.md": recipe(), FOLDER / "commands.md": commands(), README: readme()}
    for file, text in pages.items():
        if check and (not file.is_file() or file.read_text() != text):
            sys.exit(f"{file}: found another page than its sources make, expected the one of: python docs/reference.py")
        if not check:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text)


if __name__ == "__main__":
    main()
