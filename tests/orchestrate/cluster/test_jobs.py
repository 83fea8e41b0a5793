"""`zscl submit`: checks before the upload, and the job's command. `tests/cluster/submit.sh` submits real jobs."""

import asyncio
import base64
import io
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.command import Command
from support.errors import refused

from orchestrate.cluster import jobs
from orchestrate.cluster.jobs import build_entrypoint, connect_job_client, measure_upload_megabytes, submit_job
from schemas.errors import ErrorCode, InterruptedRunError

ANSWERS = {
    "/api/version": {"ray_version": "2.50.0", "version": "4"},
    "/api/jobs/": {"submission_id": "raysubmit_1", "job_id": "raysubmit_1"},
}


class Dashboard(BaseHTTPRequestHandler):
    """What Ray's job client asks of a dashboard."""

    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.removeprefix("/a;b")
        result = path in ANSWERS or path.startswith("/api/packages/")
        body = json.dumps(ANSWERS.get(path, {})).encode()
        self.send_response(200 if result else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """HOST:PORT of a web server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*jobs.ADDRESS_VARIABLES, jobs.HEADERS_VARIABLE, "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dashboard() -> Iterator[str]:
    Dashboard.asked = []
    with serving(Dashboard) as address:
        yield address


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_rays_environment_variables_replace_the_address(
    variable: str, dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setenv(variable, f"http://{dashboard}")
    assert connect_job_client(None, messages.append).get_address() == f"http://{dashboard}"
    assert messages == []
    assert connect_job_client("http://127.0.0.1:9", messages.append).get_address() == f"http://{dashboard}"
    assert messages == [f"{variable} is set to http://{dashboard}: Ray's job client uses it instead of --address "
                    "http://127.0.0.1:9"]  # fmt: skip


def test_credentials_headers_and_certificates_are_sent(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connect_job_client(f"http://user:word@{dashboard}/", print)
    assert Dashboard.asked[-1][1]["Authorization"] == f"Basic {base64.b64encode(b'user:word').decode()}"
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Team": "ours"}')
    connect_job_client(f"http://{dashboard}/", print)
    assert Dashboard.asked[-1][0] == "/api/version"
    assert Dashboard.asked[-1][1]["X-Team"] == "ours"
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
    connect_job_client(f"http://{dashboard}", print)  # has no certificate
    with refused(ErrorCode.UNREACHABLE, "--address") as error:
        connect_job_client(f"https://{dashboard}", print)
    assert "/no/such/file" in str(error.value)
    for headers in ("team", '["X-Team"]', '{"X-Team": 1}'):
        monkeypatch.setenv("RAY_JOB_HEADERS", headers)
        with refused(ErrorCode.INVALID_VALUE, "RAY_JOB_HEADERS"):
            connect_job_client(f"http://{dashboard}", print)


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_cluster_is_found_by_its_gcs(
    address: str | None, dashboard: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
    _internal_kv_put(DASHBOARD_ADDRESS, dashboard, namespace=KV_NAMESPACE_DASHBOARD)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    try:
        assert connect_job_client(address, print).get_address() == f"http://{dashboard}"
    finally:
        _internal_kv_del(DASHBOARD_ADDRESS, namespace=KV_NAMESPACE_DASHBOARD)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("http://no-such-host.invalid:8265", "Failed to resolve"),
        ("http://host:port", "not a valid host or port"),
        ("nonsense", "Invalid address format: nonsense"),
        ("json://x", "Module: json does not have"),
        ("no_such_module://x", "Module: no_such_module does not exist"),
    ],
)
def test_a_wrong_address_is_refused_with_rays_reason(address: str, reason: str) -> None:
    with refused(ErrorCode.UNREACHABLE, "--address") as error:
        connect_job_client(address, print)
    assert str(error.value).startswith(f"--address {address}: found no Ray cluster that accepts the job")
    assert reason in str(error.value)


def test_another_web_server_and_a_silent_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(BaseHTTPRequestHandler) as address, refused(ErrorCode.UNREACHABLE, "--address") as error:
        connect_job_client(f"http://{address}", print)
    assert "501 Server Error" in str(error.value)
    monkeypatch.setattr(jobs, "CONNECT_TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with refused(ErrorCode.UNREACHABLE, "--address") as error:
            connect_job_client(f"http://127.0.0.1:{silent.getsockname()[1]}", print)
    assert "no answer within 0.2 s" in str(error.value)


def test_the_stop_command_is_quoted_and_has_no_password(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.job_submission import JobSubmissionClient

    async def interrupted(client: JobSubmissionClient, job: str) -> AsyncIterator[str]:
        await asyncio.sleep(0)
        raise InterruptedRunError("", 130)
        yield ""

    job, follow = submit_job("true", tmp_path, f"http://user:word@{dashboard}/a;b", 1.0, print)
    assert job.id == "raysubmit_1"
    monkeypatch.setattr(JobSubmissionClient, "tail_job_logs", interrupted)
    with pytest.raises(InterruptedRunError) as left:
        follow(io.StringIO())
    assert f"ray job stop --address 'http://user:***@{dashboard}/a;b' raysubmit_1" in str(left.value)


@pytest.fixture
def file(tmp_path: Path, recipe: Callable[..., dict[str, Any]]) -> Path:
    (tmp_path / "experiments").mkdir()
    YAML(typ="safe").dump(recipe(), tmp_path / "experiments/my own.yaml")
    return tmp_path / "experiments/my own.yaml"


def test_the_entrypoint_is_the_users_command(file: Path, tmp_path: Path) -> None:
    command = build_entrypoint(file, ["seed=1", "method={preset: zscl, average: null}"], "/shared/runs/mine", tmp_path)
    assert command == (
        "zscl run 'experiments/my own.yaml' --out /shared/runs/mine --set seed=1 "
        "--set 'method={preset: zscl, average: null}'"
    )


def test_invalid_recipes_are_refused_before_the_upload(file: Path, tmp_path: Path) -> None:
    with refused(ErrorCode.UNKNOWN_NAME, "sed"):
        build_entrypoint(file, ["sed=1"], None, tmp_path)
    with refused(ErrorCode.CONFLICT, "--working-dir"):
        build_entrypoint(file, [], None, tmp_path / "else")


def test_no_cluster_answers(file: Path, tmp_path: Path, zscl: Callable[..., Command]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    result = zscl("submit", file, "--working-dir", tmp_path, "--address", address)
    assert (result.code, f"--address {address}: found no Ray cluster that accepts the job" in result.error) == (2, True)


def test_the_size_of_the_upload(file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/large").write_bytes(os.urandom(2_000_000))
    assert measure_upload_megabytes(tmp_path) > 2
    (tmp_path / ".rayignore").write_text("/runs/\n")
    assert measure_upload_megabytes(tmp_path) < 0.01
