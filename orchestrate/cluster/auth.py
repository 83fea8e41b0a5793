"""Who may talk to Ray: whoever holds the token, a file that only its owner reads, and, here, is on this machine.

Ray's ports run what they are sent, so a cluster without a token belongs to everybody who can reach it. Ray makes a
token for a cluster that it starts, readable by all users of the machine, and does not send one to a cluster it is told
to join. On Linux, it listens on every interface, whatever address it is given.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._private import ray_constants
from ray._raylet import Config  # type: ignore[attr-defined]  # a part of Ray's in C

MODE = "RAY_AUTH_MODE"
OWNER_ALONE = 0o600


def use_token(starts_here: bool) -> None:
    """Switch Ray's authentication on where a token is at hand, and make one for a cluster that starts here.

    The user's own RAY_AUTH_MODE is left as it is. To be called before Ray is.

    Args:
        starts_here: the cluster is our own, rather than one to join.
    """
    mode = os.environ.get(MODE, "token").lower()
    if mode != "token":
        return
    if not has_token() and starts_here:
        _make()
    if not has_token():
        return  # the cluster to join says whether it needs one
    os.environ[MODE] = mode
    Config.initialize("")  # Ray reads the mode when it is imported, and again here
    if (file := token_file()) is not None and _can_read(file):
        _keep_to_owner(file)


@contextmanager
def bind_to_loopback() -> Iterator[None]:
    """Let a Ray that is started meanwhile listen on the loopback interface alone, with all its processes.

    It is what Ray does on macOS and Windows, where its one switch for it is off by default.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def has_token() -> bool:
    """Whether there is a token, in a variable or in its file."""
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or _can_read(token_file())


def token_file() -> Path | None:
    """Where Ray looks for the token; nowhere for a user without a home."""
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    except RuntimeError:  # neither HOME nor an entry for the user, as in a container with another user's number
        return None


def _can_read(file: Path | None) -> bool:
    """Whether there is such a file, and it is not somebody else's."""
    return file is not None and os.access(file, os.R_OK)


def _make() -> None:
    """Make a token in its file, or for this process and its children alone where the home cannot be written."""
    token, file = secrets.token_hex(32), token_file()
    try:
        if file is None:
            raise FileNotFoundError("no home")
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ALONE)
    except OSError:
        if not _can_read(file):  # otherwise another run was quicker: its token is as good
            os.environ["RAY_AUTH_TOKEN"] = token
        return
    with os.fdopen(descriptor, "w") as stream:
        stream.write(token)


def _keep_to_owner(file: Path) -> None:
    if file.stat().st_mode & 0o077 and os.access(file, os.W_OK):
        file.chmod(OWNER_ALONE)
