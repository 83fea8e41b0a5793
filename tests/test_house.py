"""Tests of the structure of the packages: number of modules per folder, length of functions, and allowed imports.

`make lint` checks the layers, which are contracts of import-linter in `pyproject.toml`.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES_A_FOLDER = {"schemas": 14}  # this package has no subpackages
MOST_MODULES = 10
LINES_A_FUNCTION = 60
LINEAR = {"zscl/training/stage.py: train_stage"}  # its steps are sequential, and splitting it would not make it clearer
# Packages that a package may import anywhere in a file; `tests/test_walls.py` checks indirect imports.
PYDANTIC = {"pydantic", "pydantic_core"}
ALLOWED = {
    "schemas": PYDANTIC | {"schemas"},
    "zscl": PYDANTIC
    | {"schemas", "zscl"}
    | {"torch", "torchvision", "open_clip", "numpy", "safetensors", "PIL"}
    | {"webdataset", "braceexpand", "fsspec", "filelock", "huggingface_hub"}
    | {"sklearn", "matplotlib"},  # for the images and the fonts of the embedded digits
}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Yield name and length of each function in a file, without decorators and docstring."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            yield f"{file.relative_to(ROOT)}: {node.name}", (node.end_lineno or 0) - first.lineno + 1


def imported(file: Path) -> set[str]:
    """Return the packages that are imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(file.relative_to(ROOT).parts[0] if node.level else (node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", ["schemas", "zscl", "orchestrate"])
def test_no_folder_has_too_many_modules(package: str) -> None:
    folders = Counter(file.parent.relative_to(ROOT).as_posix() for file in files_of(package) if file.stem != "__init__")
    assert folders
    crowded = {name: count for name, count in folders.items() if count > MODULES_A_FOLDER.get(name, MOST_MODULES)}
    assert crowded == {}


@pytest.mark.parametrize("package", ALLOWED)
def test_no_function_is_too_long(package: str) -> None:
    files = files_of(package)
    long = {name: length for file in files for name, length in functions(file) if length > LINES_A_FUNCTION}
    assert {name: length for name, length in long.items() if name not in LINEAR} == {}


@pytest.mark.parametrize("package", ALLOWED)
def test_only_what_is_allowed_is_imported_anywhere(package: str) -> None:
    strangers = {
        str(file.relative_to(ROOT)): found
        for file in files_of(package)
        if (found := imported(file) - ALLOWED[package] - sys.stdlib_module_names)
    }
    assert strangers == {}
