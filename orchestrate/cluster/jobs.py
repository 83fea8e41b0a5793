"""`zscl submit`: a run as a job of a Ray cluster, through Ray's own job client."""

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
from schemas.errors import InputError, InterruptedRunError, one_line
from schemas.errors import shell_command as shown
from schemas.redaction import mask

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = (
    "RAY_API_SERVER_ADDRESS",
    "RAY_ADDRESS",
)  # Ray's client takes the first that is set, before any argument
HEADERS_VARIABLE = "RAY_JOB_HEADERS"
CONNECT_TIMEOUT_SECONDS = 90.0  # Ray gives up a GCS after 40 seconds, but waits for a silent dashboard for ever
STOP_MARGIN_SECONDS = 10  # beyond compute.grace_seconds, until Ray kills a job that is asked to stop
EXIT_CODES = {"SUCCEEDED": 0, "STOPPED": 143}


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    id: str
    address: str
    entrypoint: str


def build_entrypoint(recipe: Path, overrides: Sequence[str], out: str | None, working_dir: Path) -> str:
    """The command that the job runs, in a copy of the working directory.

    Raises:
        InputError: the recipe lies outside of that, or is refused.
    """
    load_variants(recipe, overrides)  # refused here rather than minutes later on the cluster
    if not recipe.resolve().is_relative_to(working_dir):
        raise InputError(f"{recipe}: found it outside of {working_dir}, expected it in the working directory")
    command = ["zscl", "run", str(recipe.resolve().relative_to(working_dir))]
    command += ["--out", out] if out else []
    return shlex.join([*command, *(part for override in overrides for part in ("--set", override))])


def measure_upload_megabytes(working_dir: Path) -> float:
    """What Ray packs of a working directory, by the ignore files in it."""
    from ray._private.runtime_env.packaging import create_package

    with tempfile.TemporaryDirectory() as place:
        package = Path(place, "package.zip")
        create_package(str(working_dir), package, include_gitignore=True, logger=logging.getLogger("ray.packing"))
        return package.stat().st_size / 1e6


def connect_job_client(address: str | None, note: Callable[[str], None]) -> "JobSubmissionClient":
    """Return Ray's job client, connected to a cluster. Which address is a cluster's is for Ray to say.

    Args:
        address: As `JobSubmissionClient` takes it; the variables of Ray's come before it, as there.
        note: Told of a variable that takes the place of the address.

    Raises:
        InputError: Ray's client finds no cluster, or gets no answer within `ANSWER_SECONDS`.
    """
    enable_token_auth(starts_cluster=False)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    source = next((name for name in ADDRESS_VARIABLES if os.environ.get(name)), "--address")
    where = os.environ.get(source) or address or DEFAULT_ADDRESS
    if address and where != address:
        note(f"{source} is set to {mask(where)}: Ray's job client takes that, not --address {mask(address)}")
    headers = _headers()
    answer: list[JobSubmissionClient | Exception] = []

    def ask() -> None:
        try:
            answer.append(JobSubmissionClient(where, headers=headers, verify=_certificates(where)))
        except Exception as error:  # raised again by the thread that waits
            answer.append(error)

    asking = Thread(target=ask, daemon=True)  # a daemon: it does not keep the process from ending
    asking.start()
    asking.join(CONNECT_TIMEOUT_SECONDS)
    found = answer[0] if answer else TimeoutError(f"no answer within {CONNECT_TIMEOUT_SECONDS:g} s")
    if isinstance(found, JobSubmissionClient):
        return found
    if isinstance(found, OSError | RuntimeError | ValueError | AssertionError | LookupError | TypeError | RayError):
        raise _refusal(f"{source} {mask(where)}", found) from found
    raise found


def _headers() -> dict[str, str] | None:
    """The headers of RAY_JOB_HEADERS, which `ray job submit` sends too.

    Raises:
        InputError: It holds no JSON object of texts.
    """
    try:
        headers = json.loads(os.environ.get(HEADERS_VARIABLE) or "null")
    except ValueError:
        headers = ""
    if headers is None or (isinstance(headers, dict) and all(isinstance(each, str) for each in headers.values())):
        return headers
    raise InputError(f'{HEADERS_VARIABLE}: found no JSON object of texts, expected {{"NAME": "VALUE"}}')


def _certificates(where: str) -> str | bool:
    """What Ray's client verifies a server's certificate with: also where it follows the output, beside `requests`."""
    file = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    return file if file and where.startswith("https://") else True


def _refusal(which: str, error: BaseException) -> InputError:
    cause = f": {one_line(error.__context__)}" if error.__context__ else ""
    return InputError(
        f"{which}: found no Ray cluster that takes the job ({mask(one_line(error) + cause)}), expected the address of "
        f"its dashboard, {DEFAULT_ADDRESS} by default, or of its GCS, HOST:PORT; where it asks for a token, RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH"
    )


def submit_job(
    command: str, working_dir: Path, address: str | None, grace_seconds: float, note: Callable[[str], None]
) -> tuple[Job, Callable[[IO[str]], int]]:
    """Submit a command.

    Args:
        command: as a shell takes it.
        working_dir: uploaded, but for what .gitignore and .rayignore name.
        address: as `connect` takes it.
        grace_seconds: that the run wants to stop in.
        note: told of what takes the place of the address.

    Returns the job, and what follows it: writes its output somewhere until it ends, and gives an exit code.

    Raises:
        InputError: no cluster answers there, or it does not take the job.
    """
    from ray.exceptions import RayError

    client = connect_job_client(address, note)
    where = client.get_address()
    patience = str(round(grace_seconds) + STOP_MARGIN_SECONDS)
    environment = {"working_dir": str(working_dir), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": patience}}
    try:
        job = Job(client.submit_job(entrypoint=command, runtime_env=environment), where, command)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise _refusal(mask(where), error) from error

    logs = shown("ray", "job", "logs", "--follow", "--address", where, job.id)

    def follow(output: IO[str]) -> int:
        async def tail() -> None:
            async for lines in client.tail_job_logs(job.id):
                print(lines, end="", flush=True, file=output)

        try:
            asyncio.run(tail())
        except InterruptedRunError as interrupt:
            stop = shown("ray", "job", "stop", "--address", where, job.id)
            raise InterruptedRunError(
                f"job {job.id} goes on without being followed; follow it: {logs}; stop it: {stop}", interrupt.exit_code
            ) from None
        except Exception as error:  # of the connection: the job does not need us
            raise InputError(
                f"job {job.id}: found its output cut off ({type(error).__name__}), expected it to its end; the job may "
                f"go on: {logs}"
            ) from error
        return EXIT_CODES.get(str(client.get_job_status(job.id)), 1)

    return job, follow
