"""Explanations of MLflow store errors: the cause, what to do, and the code."""

import json
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrate.tracking.mlflow_client import open_store
from orchestrate.tracking.store_errors import FAILURES, MAX_REASON_LENGTH, artifact_error, store_error
from schemas.errors import ErrorCode, InputError


def open_error(uri: str, experiment: str = "zscl") -> InputError:
    """The explanation of a store that cannot be opened."""
    with pytest.raises((*FAILURES, InputError)) as error:
        open_store(uri, experiment)
    return store_error(uri, error.value)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        code, body = self.server.answer
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[Callable[[int, str], str]]:
    """A function that sets the status and body of all of a server's answers; returns its address."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()

    def answer(code: int, body: str) -> str:
        server.answer = code, body
        return f"http://127.0.0.1:{server.server_port}"

    yield answer
    server.shutdown()
    server.server_close()


REBINDING = "Invalid Host header - possible DNS rebinding attack detected"


@pytest.mark.parametrize(
    ("code", "body", "expected"),
    [
        (401, "You are not authenticated.", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, REBINDING, "Start the server with --allowed-hosts 127.0.0.1"),
        (403, "Permission denied", "tracking.experiment: this user may not write"),
        (403, json.dumps({"error_code": "PERMISSION_DENIED", "message": "no"}), "tracking.experiment: this user may"),
        (404, "<html>nothing here</html>", "found no MLflow server at"),
        (200, "<html>hello</html>", "found no MLflow server at"),
        (302, "", "found no MLflow server at"),
        (407, "", "NO_PROXY=127.0.0.1 to bypass it"),
        (500, "", "that fails (500 Internal Server Error)"),
        (502, "", "that fails (502 Bad Gateway)"),
        (503, "", "that fails (503 Service Unavailable)"),
    ],
)
def test_each_answer_of_a_server_is_explained(
    answers: Callable[[int, str], str], code: int, body: str, expected: str
) -> None:
    error = open_error(answers(code, body))
    assert expected in str(error)
    assert "no reachable" not in str(error)
    is_rejected = code in (401, 403) or code >= 500
    assert error.code == (ErrorCode.REJECTED if is_rejected else ErrorCode.UNREACHABLE)
    assert error.field in ("tracking.uri", "tracking.experiment")


def test_requests_that_do_not_reach_the_server(
    answers: Callable[[int, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answers(200, "{}")
    assert "expected http:// instead of https://" in str(open_error(plain.replace("http://", "https://")))
    assert "(ConnectionRefusedError: [Errno 111] Connection refused)" in str(open_error("http://127.0.0.1:9"))
    assert "Name or service not known" in str(open_error("http://no-such-host.invalid:5000"))
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    error = open_error("http://mlflow.example:5000")
    assert (error.code, error.field) == (ErrorCode.UNREACHABLE, "tracking.uri")
    sentence = str(error)
    assert "through the proxy http://me:***@127.0.0.1:9 (ConnectionRefusedError" in sentence
    assert "NO_PROXY=mlflow.example" in sentence


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("nonsense://x", "which is not the URI of an MLflow store, expected http://HOST:PORT, sqlite:///FILE"),
        ("s3://bucket/x", "which is not the URI of an MLflow store"),
        ("localhost:5000", "expected http://localhost:5000"),
        ("sqlite://x.db", "which is not the URI of an MLflow store"),
        ("http://host:port", "expected http://HOST:PORT"),
        ("http://", "expected http://HOST:PORT"),
        ("./mlruns", "mlflow migrate-filestore converts a folder"),
        ("file:///tmp/mlruns", "mlflow migrate-filestore converts a folder"),
        ("mssql+pyodbc://127.0.0.1/x", "127.0.0.1/x is not installed; run: pip install 'pyodbc'"),
    ],
)
def test_uris_of_no_store(uri: str, expected: str) -> None:
    error = open_error(uri)
    assert expected in str(error)
    special = {"./mlruns": ErrorCode.UNSUPPORTED, "file:///tmp/mlruns": ErrorCode.UNSUPPORTED}
    special["mssql+pyodbc://127.0.0.1/x"] = ErrorCode.MISSING_PACKAGE
    assert (error.code, error.field) == (special.get(uri, ErrorCode.INVALID_VALUE), "tracking.uri")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("bd07f7e963c5", "an older MLflow, expected"), ("ffffffffffff", "use the version of MLflow that created it")],
)
def test_a_database_of_another_version(empty_store: Path, tmp_path: Path, version: str, expected: str) -> None:
    file = Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    with closing(sqlite3.connect(file)) as database:
        database.execute("update alembic_version set version_num = ?", [version])
        database.commit()
    error = open_error(f"sqlite:///{file}")
    assert error.code == ErrorCode.MISMATCH
    assert expected in str(error)
    assert ("mlflow db upgrade sqlite:///" in str(error)) == (version == "bd07f7e963c5")


def test_an_experiment_name_that_is_too_long(empty_store: Path, tmp_path: Path) -> None:
    file = shutil.copy(empty_store, tmp_path / "mlflow.db")
    error = open_error(f"sqlite:///{file}", "x" * 501)
    assert (error.code, error.field) == (ErrorCode.INVALID_VALUE, "tracking.experiment")


@pytest.mark.parametrize(
    ("location", "uri", "error", "advice"),
    [
        ("s3://bucket/x", "http://host", ImportError("No module named 'boto3'"), "install the missing library"),
        ("s3://bucket/x", "http://host", RuntimeError("Unable to locate credentials"), "the credentials for it"),
        ("/mlruns", "http://host", PermissionError(13, "Permission denied"), "--serve-artifacts"),
        ("file:///x", "sqlite:///x.db", PermissionError(13, "Permission denied"), "make that folder writable"),
        ("mlflow-artifacts:/x", "http://host", OSError("507"), "--artifacts-destination"),
    ],
)
def test_errors_of_the_artifact_store_are_explained(location: str, uri: str, error: Exception, advice: str) -> None:
    sentence = str(artifact_error(uri, location, error))
    assert f"its artifact store at {location} did not accept the files ({type(error).__name__}: " in sentence
    assert advice in sentence


def test_a_long_reason_does_not_hide_the_advice() -> None:
    sentence = str(artifact_error("http://host", "s3://bucket/x", RuntimeError("x" * 10 * MAX_REASON_LENGTH)))
    assert sentence.endswith("in the environment of this process")
    assert len(sentence) < 2 * MAX_REASON_LENGTH
