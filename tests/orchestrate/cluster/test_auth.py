"""A local Ray cluster: no access without the token, and none from another machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrate.cluster import auth

# As `zscl run` does it, in a process of its own: Ray's mode is one of a process, and the tests switch it off.
STARTED = """
import json, os
from pathlib import Path
from orchestrate.cluster.connect import connect
from schemas.compute import Compute
os.umask(0o022)  # the usual one, with which others may read what is written
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as `taskset` and Slurm do
connect(Compute(), note=print)

import ray, psutil  # Ray brings it
from ray._raylet import AuthenticationMode, get_authentication_mode

ray.get(ray.remote(lambda: 1).remote())
own = psutil.Process()
listening = {
    (process.name(), port.laddr.ip.removeprefix("::ffff:"))
    for process in (own, *own.children(recursive=True))
    for port in process.net_connections("inet")
    if port.status == psutil.CONN_LISTEN
}
stranger = '''
from ray._raylet import GcsClient
try:
    print("let in", GcsClient(address="%s").internal_kv_keys(b"", None, timeout=600))
except Exception as error:
    print(error)
''' % ray.get_runtime_context().gcs_address
import subprocess, sys
environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
answer = subprocess.run([sys.executable, "-c", stranger], capture_output=True, text=True, env=environment, timeout=600)
print(json.dumps({
    "cores": ray.cluster_resources()["CPU"],
    "token": get_authentication_mode() == AuthenticationMode.TOKEN,
    "listening": sorted(listening),
    "dashboard": ray._private.worker._global_node.webui_url or "",
    "mode": oct((Path.home() / ".ray/auth_token").stat().st_mode & 0o777),
    "stranger": answer.stdout.strip(),
}))
ray.shutdown()
"""


def test_a_local_cluster_is_closed_to_others(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_ADDRESS"))
    }
    temporary = tmp_path / "a_folder_for_temporary_files_with_a_long_name" / "of_a_job_of_slurm"
    temporary.mkdir(parents=True)
    process = subprocess.run(
        [sys.executable, "-c", STARTED],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"HOME": str(tmp_path), "TMPDIR": str(temporary)},
        cwd=Path(__file__).parents[3],
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-2_000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["cores"] == 1
    assert found["token"] is True
    assert found["mode"] == "0o600"
    assert found["dashboard"] == ""
    assert "InvalidAuthToken" in found["stranger"]
    # All that listens before training; a worker group also has torch's rendezvous (see docs/security.md).
    assert {address for _, address in found["listening"]} == {"127.0.0.1"}
    assert {name for name, _ in found["listening"]} >= {"gcs_server", "raylet"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token; nothing of Ray itself is touched."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(auth, "Config", NoConfig)
    return tmp_path


def test_a_token_is_created_once_and_readable_by_its_owner_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth.enable_token_auth(starts_cluster=True)
    token = (home / ".ray/auth_token").read_text()
    assert len(token) == 64
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert os.environ["RAY_AUTH_MODE"] == "token"
    (home / ".ray/auth_token").chmod(0o644)  # as Ray itself leaves it
    auth.enable_token_auth(starts_cluster=False)
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert (home / ".ray/auth_token").read_text() == token


@pytest.mark.parametrize("where", ["/proc", "/dev/null", ""])
def test_without_a_writable_home_the_token_is_in_the_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("HOME", where)
    if not where:  # a user without an entry in the system's list, as in a container
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", dict[int, object]().__getitem__)
    auth.enable_token_auth(starts_cluster=True)
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert auth.has_token()


def test_no_token_is_created_for_a_cluster_to_join(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auth.enable_token_auth(starts_cluster=False)
    assert "RAY_AUTH_MODE" not in os.environ
    assert not (home / ".ray").exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    auth.enable_token_auth(starts_cluster=False)
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_authentication_can_be_switched_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    auth.enable_token_auth(starts_cluster=True)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert not (home / ".ray").exists()


class NoConfig:
    """Ray's, which other tests of this process need as it is."""

    @staticmethod
    def initialize(config: str) -> None:
        """Do nothing."""
