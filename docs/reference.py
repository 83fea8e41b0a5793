"""Generate the reference pages: recipe, commands, modules, API, and the tree in the README.

python docs/reference.py            # writes docs/reference/ and the tree in README.md
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
    "schemas": "Pydantic models of recipes, events and results, without torch",
    "zscl": "Learning: torch, open_clip and webdataset; runs a sequence in one process",
    "orchestrate": "Execution and reporting: Ray, MLflow, command line",
}
OTHER_FOLDERS = {
    "experiments": "Recipes; the first lines give the command, the cost and the expected result",
    "examples": "Own image folders, a custom loss, results in pandas",
    "benchmarks": "Benchmarks: speed, memory and correctness on a GPU",
    "deploy": "Clusters other than that of ray_cluster.yaml",
    "docs": "The documentation",
    "tests": "Tests; they mirror the packages",
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
TREE_HEAD = "## Where things are\n\n```\n"
MODULES_HEAD = """# Modules

Every module of the three packages, with the first sentence of its docstring. A module imports only from its own folder
or from folders below it in the layers (`[tool.importlinter]` in `pyproject.toml`).
"""
HEAD = """# The recipe, field by field

Generated from `schemas/` by `docs/reference.py`. An unknown field is an error that names the nearest known field.
`zscl schema` prints the same as JSON Schema, for editors. `--set a.b.c=value` overrides any field. Relative paths are
resolved against the current directory; `base` is resolved against its own file. `~`, `$NAME` and `${NAME}` are
expanded. A variable that is not set is an error (in a URL it is left unchanged).
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


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0]
    return re.split(r"(?<=[\w`)])[.;](?=\s|$)", " ".join(first.split()))[0]


def folders(package: str) -> list[Path]:
    """The folders of a package that hold modules, the package's own first."""
    return sorted(file.parent for file in (ROOT / package).rglob("__init__.py"))


def modules(folder: Path) -> list[Path]:
    """The modules of a folder, deprecated ones left out."""
    files = sorted(file for file in folder.glob("*.py") if file.stem != "__init__")
    return [file for file in files if not first_sentence(file).startswith("Deprecated")]


def dotted(path: Path) -> str:
    """The dotted name of a module or a package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def tree() -> str:
    """The packages and their subpackages, each with its first sentence."""
    lines = []
    for package, caption in PACKAGES.items():
        lines.append(f"{package + '/':15} {caption}")
        for folder in folders(package)[1:]:
            indent = "  " * len(folder.relative_to(ROOT / package).parts)
            lines.append(f"{indent + folder.name + '/':15} {first_sentence(folder / '__init__.py')}")
    return "\n".join(lines + [f"{folder + '/':15} {caption}" for folder, caption in OTHER_FOLDERS.items()])


def module_list() -> str:
    """The page of all modules, each with its first sentence."""
    parts = [MODULES_HEAD]
    for package in PACKAGES:
        for folder in folders(package):
            files = modules(folder)
            if files:
                rows = [f"| `{file.stem}` | {first_sentence(file)} |" for file in files]
                title = f"## [`{dotted(folder)}`](api/{dotted(folder)}.md)"
                intro = f"{first_sentence(folder / '__init__.py')}."
                parts.append("\n".join([title, "", intro, "", "| module | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def api_pages() -> dict[Path, str]:
    """A page for each folder, which mkdocstrings fills with the docstrings of its modules."""
    return {
        FOLDER / f"api/{dotted(folder)}.md": "\n".join(
            [f"# {dotted(folder)}", "", f"{first_sentence(folder / '__init__.py')}.", ""]
            + [f"::: {dotted(file)}\n" for file in modules(folder)]
        )
        for package in PACKAGES
        for folder in folders(package)
        if modules(folder)
    }


def readme() -> str:
    """The README with its tree as it is."""
    before, head, rest = README.read_text().partition(TREE_HEAD)
    return f"{before}{head}{tree()}\n```{rest.partition('```')[2]}"


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a page is not as it should be"
    )
    check = parser.parse_args().check
    pages = {
        FOLDER / "recipe.md": recipe(),
        FOLDER / "commands.md": commands(),
        FOLDER / "modules.md": module_list(),
        README: readme(),
    } | api_pages()
    for stale in set((FOLDER / "api").glob("*.md")) - pages.keys():
        if check:
            sys.exit(f"{stale}: found the page of no package, expected it to be removed: python docs/reference.py")
        stale.unlink()
    for file, text in pages.items():
        if check and (not file.is_file() or file.read_text() != text):
            sys.exit(f"{file}: found another page than its sources make, expected the one of: python docs/reference.py")
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


if __name__ == "__main__":
    main()
