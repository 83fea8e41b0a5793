"""Worker processes: advice on storage errors, and log records of loader processes."""

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from zscl.runtime.retry import retry_io


@pytest.mark.parametrize(
    ("number", "file", "sentence"),
    [
        (errno.ENOSPC, None, "runs/own: No space left on device; free space on its disk, and the same command resumes"),
        (errno.EACCES, "runs/own/stages", "runs/own/stages: Permission denied; make the folder writable"),
        (errno.EROFS, "runs/own/stages", "runs/own/stages: Read-only file system; make its disk writable"),
        (errno.EIO, "runs/own/stages", ""),
        (errno.EACCES, None, "runs/own: Permission denied; make the folder writable"),
        (errno.ENOSPC, "/cache/0.tar", "/cache/0.tar: No space left on device; free space on its disk"),
        # Errors of one machine: another machine can do the work.
        *((number, name, "") for number in (errno.EACCES, errno.EPERM, errno.EROFS) for name in (
            "/cache/0.tar", b"/cache/0.tar", "runs/other/stages", "runs/own-2/stages", "runs/own/../other",
        )),
    ],
)  # fmt: skip
def test_persistent_storage_errors_come_with_advice(number: int, file: str | bytes | None, sentence: str) -> None:
    from orchestrate.cluster.train_workers import storage_error_advice

    advice = storage_error_advice(OSError(number, os.strerror(number), file), Path("runs/own"))
    assert advice.startswith(sentence)
    assert bool(advice) == bool(sentence)


def test_files_of_the_run_folder_are_recognized_by_absolute_path_and_as_rename_targets() -> None:
    from orchestrate.cluster.train_workers import storage_error_advice

    for names in ((str(Path("runs/own/stages").absolute()), None, None), ("/cache/0.tar", None, "runs/own/stages")):
        assert storage_error_advice(OSError(errno.EACCES, "Permission denied", *names), Path("runs/own"))


def test_log_records_of_a_forked_loader_process_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    """In a forked process, Ray's client would block forever."""
    from orchestrate.cluster.train_workers import EventLogHandler

    process, messages = os.getpid(), list[str]()

    def report(event: BaseModel) -> None:
        if os.getpid() != process:
            os._exit(3)
        messages.append(str(event))

    def read(name: str) -> str:
        failures = iter([OSError(errno.ESTALE, os.strerror(errno.ESTALE), name)])

        def access() -> str:
            for failure in failures:
                raise failure
            return name

        return retry_io(access)

    logger, handler = logging.getLogger("zscl"), EventLogHandler(report)
    logger.addHandler(handler)
    try:
        loader = torch.utils.data.DataLoader(
            ["in the loader"], num_workers=1, collate_fn=lambda names: read(names[0]), multiprocessing_context="fork"
        )
        assert list(loader) == ["in the loader"]
        assert read("in the worker") == "in the worker"
    finally:
        logger.removeHandler(handler)
    [note] = messages
    assert "Stale file handle: 'in the worker'; retrying in" in note
    assert "Stale file handle: 'in the loader'; retrying in" in capfd.readouterr().err
