"""Submission of a run as a job of a Ray cluster (`zscl submit`), with Ray's job client."""

import asyncio
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING

from orchestrate.cluster.auth import enable_token_auth
from orchestrate.recipes.variants import load_variants
from schemas.errors import ErrorCode, InputError, InterruptedRunError, one_line, shell_command
from schemas.redaction import mask

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray's job client uses the first of these environment variables that is set, even if an address is passed to it.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
HEADERS_VARIABLE = "RAY_JOB_HEADERS"
CONNECT_TIMEOUT_SECONDS = 90.0  # Ray's own timeout is 40 seconds for a GCS; it has none for a dashboard
STOP_MARGIN_SECONDS = 10  # between compute.grace_seconds and the time after which Ray kills a job that was stopped
EXIT_CODES = {"SUCCEEDED": 0, "STOPPED": 143}


@dataclass(frozen=True)
class Job:
    """A submitted job.

    Attributes:
        id: Ray's submission ID.
        address: The address of the cluster's dashboard.
        entrypoint: The shell command that the job runs.
    """

    id: str
    address: str
    entrypoint: str


def build_entrypoint(recipe: Path, overrides: Sequence[str], out: str | None, working_dir: Path) -> str:
    """Build the command `zscl run` that a job runs in a copy of the working directory.

    Args:
        recipe: The path of the recipe.
        overrides: Changes to the recipe, each of the form `a.b.c=value`.
        out: The run's folder on the cluster; `None` for the default.
        working_dir: The directory that Ray copies to the cluster. It must contain the recipe.

    Returns:
        The command, quoted for a shell.

    Raises:
        InputError: The recipe is invalid, or outside the working directory.
    """
    load_variants(recipe, overrides)  # detects an invalid recipe now, and not minutes later on the cluster
    if not recipe.resolve().is_relative_to(working_dir):
        raise InputError(
            f"{recipe}: the recipe is outside the working directory {working_dir}. Move it there, or set --working-dir "
            "to a folder that contains it",
            code=ErrorCode.CONFLICT,
            field="--working-dir",
        )
    command = ["zscl", "run", str(recipe.resolve().relative_to(working_dir))]
    command += ["--out", out] if out else []
    return shlex.join([*command, *(word for override in overrides for word in ("--set", override))])


def measure_upload_megabytes(working_dir: Path) -> float:
    """Return the size of the package that Ray creates from a working directory, without ignored files, to upload it."""
    from ray._private.runtime_env.packaging import create_package

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "package.zip")
        create_package(str(working_dir), package, include_gitignore=True, logger=logging.getLogger("ray.packing"))
        return package.stat().st_size / 1e6


def connect_job_client(address: str | None, note: Callable[[str], None]) -> "JobSubmissionClient":
    """Connect Ray's job client to a cluster.

    Args:
        address: An address that `JobSubmissionClient` accepts. The environment variables `ADDRESS_VARIABLES` take
            precedence.
        note: Called with a message if an environment variable takes precedence over `address`.

    Returns:
        The client.

    Raises:
        InputError: No cluster answers at the address within `CONNECT_TIMEOUT_SECONDS`, or it rejects the client.
    """
    enable_token_auth(starts_cluster=False)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    source = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), "--address")
    target = os.environ.get(source) or address or DEFAULT_ADDRESS
    if address and target != address:
        note(f"{source} is set to {mask(target)}: Ray's job client uses it instead of --address {mask(address)}")
    headers = _read_headers()
    results: list[JobSubmissionClient | Exception] = []

    def connect() -> None:
        try:
            results.append(JobSubmissionClient(target, headers=headers, verify=_certificates(target)))
        except Exception as error:  # raised again by the waiting thread
            results.append(error)

    thread = Thread(target=connect, daemon=True)  # daemon: after a timeout, it does not delay the end of the process
    thread.start()
    thread.join(CONNECT_TIMEOUT_SECONDS)
    result = results[0] if results else TimeoutError(f"no answer within {CONNECT_TIMEOUT_SECONDS:g} s")
    if isinstance(result, JobSubmissionClient):
        return result
    if isinstance(result, OSError | RuntimeError | ValueError | AssertionError | LookupError | TypeError | RayError):
        message = _connection_message(f"{source} {mask(target)}", result)
        raise InputError(message, code=ErrorCode.UNREACHABLE, field=source) from result
    raise result


def _read_headers() -> dict[str, str] | None:
    """Return the HTTP headers in RAY_JOB_HEADERS. Raise `InputError` if they are malformed."""
    try:
        headers = json.loads(os.environ.get(HEADERS_VARIABLE) or "null")
    except ValueError:
        headers = ""
    if headers is None or (isinstance(headers, dict) and all(isinstance(value, str) for value in headers.values())):
        return headers
    raise InputError(
        f'{HEADERS_VARIABLE}: found no JSON object whose values are strings, expected {{"NAME": "VALUE"}}',
        code=ErrorCode.INVALID_VALUE,
        field=HEADERS_VARIABLE,
    )


def _certificates(address: str) -> str | bool:
    """Return the file of CA certificates for Ray's client, or `True` for the default.

    The path of this file is in REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE. Ray's client ignores these environment variables
    when it follows a job's output.
    """
    file = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    return file if file and address.startswith("https://") else True


def _connection_message(subject: str, error: BaseException) -> str:
    cause = f": {one_line(error.__context__)}" if error.__context__ else ""
    return (
        f"{subject}: found no Ray cluster that accepts the job ({mask(one_line(error) + cause)}), expected the address "
        f"of its dashboard, {DEFAULT_ADDRESS} by default, or of its GCS, HOST:PORT. If the cluster requires a token, "
        "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    )


def submit_job(
    command: str, working_dir: Path, address: str | None, grace_seconds: float, note: Callable[[str], None]
) -> tuple[Job, Callable[[IO[str]], int]]:
    """Submit a command to a Ray cluster as a job.

    Args:
        command: The command, quoted for a shell.
        working_dir: The directory to upload. Files that .gitignore or .rayignore exclude are not uploaded.
        address: The cluster's address; see `connect_job_client`.
        grace_seconds: The maximum time in seconds that the run needs to stop after a request.
        note: Called with a message if an environment variable takes precedence over `address`.

    Returns:
        The job, and a function that copies the job's output to a stream until the job ends, and returns an exit code
            for the job's final status.

    Raises:
        InputError: No cluster answers at the address, or the cluster does not accept the job.
    """
    from ray.exceptions import RayError

    client = connect_job_client(address, note)
    dashboard = client.get_address()
    stop_seconds = str(round(grace_seconds) + STOP_MARGIN_SECONDS)
    environment = {"working_dir": str(working_dir), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": stop_seconds}}
    try:
        job = Job(client.submit_job(entrypoint=command, runtime_env=environment), dashboard, command)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        message = _connection_message(mask(dashboard), error)
        raise InputError(message, code=ErrorCode.REJECTED, field="--address") from error
    return job, lambda output: _follow(client, job, output)


def _follow(client: "JobSubmissionClient", job: Job, output: IO[str]) -> int:
    """Copy a job's output to a stream until the job ends, and return an exit code for its final status."""
    logs = shell_command("ray", "job", "logs", "--follow", "--address", job.address, job.id)

    async def tail() -> None:
        async for lines in client.tail_job_logs(job.id):
            print(lines, end="", flush=True, file=output)

    try:
        asyncio.run(tail())
    except InterruptedRunError as interrupt:
        stop = shell_command("ray", "job", "stop", "--address", job.address, job.id)
        raise InterruptedRunError(
            f"job {job.id} continues to run; to follow its output: {logs}; to stop it: {stop}", interrupt.exit_code
        ) from None
    except Exception as error:  # the connection failed; this does not affect the job
        raise InputError(
            f"job {job.id}: the connection to its output was lost ({type(error).__name__}); the job may still be "
            f"running: {logs}",
            code=ErrorCode.UNREACHABLE,
        ) from error
    return EXIT_CODES.get(str(client.get_job_status(job.id)), 1)
