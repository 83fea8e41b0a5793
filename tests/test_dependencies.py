"""Tests that imported packages are declared, documented and covered by the constraints."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"schemas", "zscl", "orchestrate"}


def named(requirement: str) -> str:
    """Return the normalized name of a requirement's distribution."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def imported(package: str) -> set[str]:
    """Return the third-party modules that a package imports, without submodules."""
    found = set()
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - OURS - set(sys.stdlib_module_names)


def test_nothing_is_imported_that_is_not_declared() -> None:
    declared = {named(each) for each in PROJECT["dependencies"]} | {"pydantic-core"}  # pinned by pydantic
    providers = packages_distributions()
    for package in OURS:
        for module in imported(package):
            provided_by = {named(each) for each in providers[module]}
            assert provided_by & declared, f"{package} imports {module} of {provided_by}, which pyproject.toml lacks"


def test_every_dependency_is_in_the_table() -> None:
    table = (ROOT / "docs/dependencies.md").read_text().lower()
    shown = {named(word) for word in re.findall(r"[a-z][a-z0-9_.\-]+", table)}
    for requirement in PROJECT["dependencies"]:
        assert named(requirement) in shown, requirement


def test_both_files_of_constraints_allow_what_is_declared() -> None:
    optional = PROJECT["optional-dependencies"]
    declared = [Requirement(each) for each in (*PROJECT["dependencies"], *optional["s3"], *optional["postgres"])]
    for file in ("constraints.txt", "constraints-oldest.txt"):
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
        pinned = {named(line): line.partition("==")[2] for line in lines}
        assert {named(each.name) for each in declared} <= pinned.keys(), file
        refused = [
            f"{each}: {pinned[named(each.name)]}" for each in declared if pinned[named(each.name)] not in each.specifier
        ]
        assert refused == [], file


def test_upper_bounds_are_the_major_versions_that_are_tested() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {named(line): Version(line.partition("==")[2]) for line in lines}
    for each in map(Requirement, PROJECT["dependencies"]):
        bounds = [specifier.version for specifier in each.specifier if specifier.operator == "<"]
        tested = pinned[named(each.name)]
        assert bounds == ([] if tested.major > 2000 else [str(tested.major + 1)]), each  # a calendar version


def test_versions_of_pydantic_that_are_known_to_fail_are_excluded() -> None:
    [pydantic] = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == "pydantic"]
    assert [version for version in ("2.12.5", "2.13.0", "2.13.1", "2.13.2") if version not in pydantic.specifier] == [
        "2.13.0", "2.13.1",
    ]  # fmt: skip
