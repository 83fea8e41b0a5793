"""Hidden files, recursive listing, and suggestions for misspelt paths."""

from pathlib import Path

import pytest

from zscl.runtime.paths import did_you_mean_path, is_hidden, list_files


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("a.jpg", False),
        ("./a.jpg", False),
        ("../folder/a.jpg", False),
        (".DS_Store", True),
        ("folder/._a.jpg", True),
        (".git/config", True),
        ("__MACOSX/a.jpg", True),
        ("Thumbs.db", True),
        ("folder/desktop.ini", True),
        ("./", True),
    ],
)
def test_hidden_files(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden


def test_files_are_listed_recursively_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/1.jpg", "a.jpg", ".hidden/3.jpg", "b/Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/cycle").symlink_to(tmp_path)
    assert list_files(tmp_path) == [tmp_path / "a.jpg", tmp_path / "b/1.jpg", tmp_path / "b/2.jpg"]
    with pytest.raises(FileNotFoundError):
        list_files(tmp_path / "missing")


def test_suggestion_for_a_misspelt_path(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert did_you_mean_path(tmp_path / "trian") == "; did you mean 'train'?"
    assert did_you_mean_path(tmp_path / "something else") == ""
    assert did_you_mean_path(tmp_path / "missing/train") == ""
