"""The house in order: files and functions that one can hold in one's head, and imports that say where code may run."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES_A_FILE = 600
LINES_A_FUNCTION = 60
LINEAR = {"zscl/training/stage.py: train_stage"}  # one stage from its start to its end, to be read as such
# Wherever in a file they are imported; `tests/test_walls.py` sees what others import in turn.
PYDANTIC = {"pydantic", "pydantic_core"}
ALLOWED = {
    "schemas": PYDANTIC | {"schemas"},
    "zscl": PYDANTIC
    | {"schemas", "zscl"}
    | {"torch", "torchvision", "open_clip", "numpy", "safetensors", "PIL"}
    | {"webdataset", "braceexpand", "fsspec", "filelock", "huggingface_hub"}
    | {"sklearn", "matplotlib"},  # the embedded digits: their images, and the fonts they are drawn in
}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """Names and lengths, without their decorators."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{file.relative_to(ROOT)}: {node.name}", (node.end_lineno or 0) - node.lineno + 1


def imported(file: Path) -> set[str]:
    """The packages that are imported anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(file.relative_to(ROOT).parts[0] if node.level else (node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_no_file_and_no_function_is_too_long(package: str) -> None:
    files = files_of(package)
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > LINES_A_FILE} == {}
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
