"""Access control for Ray: token authentication, and local clusters that listen on the loopback interface only.

Ray executes any code that it receives on its ports, so everybody who can reach a cluster without a token controls it.
Ray creates a token for a cluster that it starts, but makes the token readable by all users of the machine. When Ray
joins a running cluster, it sends no token by default. On Linux, Ray listens on every interface, whatever address is
configured.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]  # a compiled module

MODE_VARIABLE = "RAY_AUTH_MODE"
OWNER_ONLY = 0o600


def enable_token_auth(starts_cluster: bool) -> None:
    """Enable Ray's token authentication if there is a token. To start a cluster, create a token if there is none.

    If RAY_AUTH_MODE is set to another mode than `token`, do nothing. This function must be called before Ray is used.

    Args:
        starts_cluster: `True` if this process starts a cluster, `False` if it joins a running cluster.
    """
    mode = os.environ.get(MODE_VARIABLE, "token").lower()
    if mode != "token":
        return
    if not has_token() and starts_cluster:
        _create_token()
    if not has_token():
        return  # if the cluster requires a token, Ray raises an error
    os.environ[MODE_VARIABLE] = mode
    Config.initialize("")  # Ray reads the mode when it is imported; this call makes it read the mode again
    if (file := token_path()) is not None and _is_readable(file):
        _restrict_to_owner(file)


@contextmanager
def bind_to_loopback() -> Iterator[None]:
    """Context manager: a Ray cluster that is started inside the context listens on the loopback interface only.

    On macOS and Windows, this is Ray's default. On Linux, Ray otherwise listens on every interface.
    """
    previous = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = previous


def has_token() -> bool:
    """Return whether there is a Ray token, in the environment or in a readable token file."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or _is_readable(token_path())


def token_path() -> Path | None:
    """Return the path of Ray's token file; `None` for a user without a home folder."""
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    except RuntimeError:  # neither HOME nor a passwd entry exists, for example for an arbitrary user ID in a container
        return None


def _is_readable(file: Path | None) -> bool:
    return file is not None and os.access(file, os.R_OK)


def _create_token() -> None:
    """Create a Ray token and write it to the token file. If this fails, store the token in the environment instead."""
    token, file = secrets.token_hex(32), token_path()
    try:
        if file is None:
            raise FileNotFoundError("no home")
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    except OSError:
        if not _is_readable(file):  # if it is readable, another run has just created it
            os.environ["RAY_AUTH_TOKEN"] = token
        return
    with os.fdopen(descriptor, "w") as stream:
        stream.write(token)


def _restrict_to_owner(file: Path) -> None:
    if file.stat().st_mode & 0o077 and os.access(file, os.W_OK):
        file.chmod(OWNER_ONLY)
