"""What is opened to be looked at, and what is no task."""

from pathlib import Path

import pytest

from schemas.errors import InputError
from zscl.checks.task_scan import scan_task


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("nowhere", "nowhere: found no such folder, expected a task"),
        (".", r"classnames\.txt: found no such file"),
        ("s3://bucket/task", "found a remote folder, expected a local one"),
    ],
)
def test_what_is_no_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        scan_task(folder)
