"""Folders that are not tasks are refused."""

from pathlib import Path

import pytest
from support.errors import refused

from schemas.errors import ErrorCode
from zscl.checks.task_scan import scan_task


@pytest.mark.parametrize(
    ("folder", "code", "path"),
    [
        ("nowhere", ErrorCode.NOT_FOUND, "nowhere"),
        (".", ErrorCode.NOT_FOUND, "classnames.txt"),
        ("s3://bucket/task", ErrorCode.UNSUPPORTED, "s3://bucket/task"),
        ("new\nline", ErrorCode.INVALID_VALUE, "new\\nline"),
    ],
)
def test_a_folder_that_is_not_a_task_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, code: ErrorCode, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(code) as error:
        scan_task(folder)
    assert path in str(error.value)
