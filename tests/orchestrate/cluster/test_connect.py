"""The address of a Ray cluster, the temporary folder of a local one, and run channels."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.errors import refused

from orchestrate.cluster.address import check_gcs, cluster_address
from orchestrate.cluster.channel import create_channel, list_running_searches
from orchestrate.cluster.connect import MAX_TEMP_BYTES, ray_temp_folder
from orchestrate.lifecycle import network
from schemas.compute import Compute
from schemas.errors import ErrorCode, InputError


@contextmanager
def web_server() -> Iterator[str]:
    """HOST:PORT of a web server that has nothing."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def silent_server() -> Iterator[str]:
    """HOST:PORT of a server that takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Ray take 127.0.0.1 for what it is; on a cluster of several nodes it is this node's other address."""
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("address", "variable", "named"),
    [
        (None, None, None),
        (None, "", None),
        (None, "host:1", "host:1"),
        ("other:2", "host:1", "other:2"),
        ("auto", "host:1", "host:1"),
        ("auto", None, "auto"),
        ("local", "host:1", None),
        (None, "local", None),
    ],
)
def test_cluster_address(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, named: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert cluster_address(Compute(address=address)) == named


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "Connection refused"),
        ("ray://127.0.0.1:9", "Connection refused"),
        ("no-such-host.invalid:6379", "Name or service not known"),
        ("a..b:6379", "a..b"),
        ("[::1]:9", "found no Ray cluster at [::1]:9"),
    ],
)
def test_an_address_without_a_cluster_is_refused_quickly(address: str, reason: str) -> None:
    with refused(ErrorCode.UNREACHABLE, "RAY_ADDRESS") as error:
        check_gcs(address, "RAY_ADDRESS")
    assert str(error.value).startswith(f"RAY_ADDRESS: found no Ray cluster at {address}")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("::1:6379", "[HOST]:PORT for IPv6"),
        ("127.0.0.1", "it is not HOST:PORT"),
        ("127.0.0.1:x", "it is not HOST:PORT"),
        ("127.0.0.1:99999", "it is not HOST:PORT"),
        ("127.0.0.1:6379/x", "it is not HOST:PORT"),
        ("http://127.0.0.1:8265", "to submit a job to a dashboard, use zscl submit --address"),
        ("redis://127.0.0.1:6379", "redis:// is not the address of a GCS"),
    ],
)
def test_a_malformed_address_is_refused(address: str, reason: str) -> None:
    with refused(ErrorCode.INVALID_VALUE, "compute.address") as error:
        check_gcs(address)
    assert str(error.value).startswith(f"compute.address: found no Ray cluster at {address}")
    assert reason in str(error.value)


@pytest.mark.parametrize("serve", [web_server, silent_server])
def test_another_server_is_not_a_cluster(monkeypatch: pytest.MonkeyPatch, serve: Callable[[], Iterator[str]]) -> None:
    monkeypatch.setattr("orchestrate.cluster.address.RPC_TIMEOUT_SECONDS", 0.5)
    with serve() as address, refused(ErrorCode.UNREACHABLE, "compute.address") as error:  # type: ignore[attr-defined]
        check_gcs(address)
    assert "the server at this address is not a Ray GCS" in str(error.value)


def test_auto_without_a_running_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)  # whatever else runs on this machine
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with refused(ErrorCode.NOT_FOUND, "compute.address"):
        check_gcs("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:9")
    with refused(ErrorCode.UNREACHABLE, "compute.address") as error:
        check_gcs("auto")
    assert "at auto, which Ray resolves to 127.0.0.1:9 " in str(error.value)


def test_a_running_cluster_is_accepted(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    check_gcs(address)
    check_gcs(address.replace("127.0.0.1", "localhost"))


def test_channels_list_running_searches_and_carry_input_errors(ray_cluster: None) -> None:
    import ray

    assert list_running_searches() == []
    channel = create_channel(search="/runs/one")
    assert ray.get(channel.input_error.remote()) is None  # the actor has started
    [name] = list_running_searches()
    assert name.startswith("/runs/one (")
    ray.get(channel.report_input_error.remote(InputError("wrong", code=ErrorCode.NO_SPACE, field="seed")))
    error = ray.get(channel.input_error.remote())
    assert (str(error), error.code, error.field) == ("wrong", ErrorCode.NO_SPACE, "seed")
    ray.kill(channel)


def test_a_silent_host_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CONNECT_SECONDS", 0.2)
    with socket.socket() as full:  # takes no connection: its queue is full
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        sockets = [socket.socket() for _ in range(4)]
        for client in sockets:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        with pytest.raises(TimeoutError, match=r"no answer from 127\.0\.0\.1:\d+ within 0\.2 s"):
            network.check_port("127.0.0.1", full.getsockname()[1])
        for client in sockets:
            client.close()


@pytest.mark.parametrize(
    ("name", "length", "folder"),
    [("TMPDIR", MAX_TEMP_BYTES, None), ("TMPDIR", MAX_TEMP_BYTES + 1, "/tmp/ray"), ("RAY_TMPDIR", 30, None)],
)
def test_socket_paths_of_a_local_ray_are_short(
    monkeypatch: pytest.MonkeyPatch, name: str, length: int, folder: str | None
) -> None:
    for other in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    assert ray_temp_folder() == "/tmp/ray"
    monkeypatch.setenv(name, given := f"/tmp/{'x' * (length - 5)}")
    monkeypatch.setattr(os, "access", lambda path, mode: path in (given, "/tmp"))
    assert ray_temp_folder() == (folder or f"{given}/ray")
    longest = f"{ray_temp_folder()}/session_2026-01-31_23-59-59_123456_4194304/sockets/plasma_store"
    assert len(longest) <= 107


def test_the_limit_depends_on_the_process_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray names a session's folder after the process that starts it."""
    session = f"/ray/session_2026-01-31_23-59-59_123456_{os.getpid()}/sockets/plasma_store"
    limit = (107 if sys.platform == "linux" else 103) - len(session)
    monkeypatch.setenv("RAY_TMPDIR", given := "/" + "x" * (limit - 1))
    assert ray_temp_folder() == f"{given}/ray"
    monkeypatch.setenv("RAY_TMPDIR", f"{given}x")
    with refused(ErrorCode.INVALID_VALUE, "RAY_TMPDIR") as error:
        ray_temp_folder()
    assert f"{limit + 1} bytes long, expected at most {limit}" in str(error.value)
    monkeypatch.chdir("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", "x" * 60)
    with refused(ErrorCode.INVALID_VALUE, "RAY_TMPDIR") as error:
        ray_temp_folder()
    assert "65 bytes long" in str(error.value)


def test_an_unusable_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    assert ray_temp_folder() == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    with refused(ErrorCode.INVALID_VALUE, "RAY_TMPDIR") as error:
        ray_temp_folder()
    assert "found /tmp/x" in str(error.value)
