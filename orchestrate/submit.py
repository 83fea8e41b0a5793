"""`zscl submit`: a run as a job of a Ray cluster, through Ray's own job client."""

import asyncio
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrate import access, recipes
from orchestrate.cluster_address import check_dashboard
from schemas.base import InputError, InterruptedRunError
from schemas.base import command as shown
from schemas.secrets import mask

ADDRESS = "http://127.0.0.1:8265"
STOP_MARGIN_SECONDS = 10  # beyond compute.grace_seconds, until Ray kills a job that is asked to stop
EXIT_CODES = {"SUCCEEDED": 0, "STOPPED": 143}


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    id: str
    address: str
    entrypoint: str


def entrypoint(recipe: Path, overrides: Sequence[str], out: str | None, working_dir: Path) -> str:
    """The command that the job runs, in a copy of the working directory.

    Raises:
        InputError: the recipe lies outside of that, or is refused.
    """
    recipes.load_variants(recipe, overrides)  # refused here rather than minutes later on the cluster
    if not recipe.resolve().is_relative_to(working_dir):
        raise InputError(f"{recipe}: found it outside of {working_dir}, expected it in the working directory")
    command = ["zscl", "run", str(recipe.resolve().relative_to(working_dir))]
    command += ["--out", out] if out else []
    return shlex.join([*command, *(part for override in overrides for part in ("--set", override))])


def megabytes_uploaded(working_dir: Path) -> float:
    """What Ray packs of a working directory, by the ignore files in it."""
    from ray._private.runtime_env.packaging import create_package

    with tempfile.TemporaryDirectory() as place:
        package = Path(place, "package.zip")
        create_package(str(working_dir), package, include_gitignore=True, logger=logging.getLogger("ray.packing"))
        return package.stat().st_size / 1e6


def submit(
    command: str, working_dir: Path, address: str | None, grace_seconds: float
) -> tuple[Job, Callable[[IO[str]], int]]:
    """Submit a command.

    Args:
        command: as a shell takes it.
        working_dir: uploaded, but for what .gitignore and .rayignore name.
        address: of the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else this machine's.
        grace_seconds: that the run wants to stop in.

    Returns the job, and what follows it: writes its output somewhere until it ends, and gives an exit code.

    Raises:
        InputError: no cluster answers there, or it does not take the job.
    """
    access.use_token(starts_here=False)
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    check_dashboard(where)
    patience = str(round(grace_seconds) + STOP_MARGIN_SECONDS)
    environment = {"working_dir": str(working_dir), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": patience}}
    try:
        client = JobSubmissionClient(where)
        job = Job(client.submit_job(entrypoint=command, runtime_env=environment), where, command)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = mask(" ".join(str(error).split()))
        raise InputError(
            f"--address {mask(where)}: found no Ray cluster that takes the job ({reason}), expected a dashboard's "
            "address; where it asks for a token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error

    def follow(output: IO[str]) -> int:
        async def tail() -> None:
            async for lines in client.tail_job_logs(job.id):
                print(lines, end="", flush=True, file=output)

        try:
            asyncio.run(tail())
        except InterruptedRunError as interrupt:
            raise InterruptedRunError(
                f"job {job.id} goes on without being followed; follow it: ray job logs --follow --address {where} "
                f"{job.id}; stop it: ray job stop --address {where} {job.id}",
                interrupt.exit_code,
            ) from None
        except Exception as error:  # of the connection: the job does not need us
            raise InputError(
                f"job {job.id}: found its output cut off ({type(error).__name__}), expected it to its end; the job may "
                f"go on: {shown('ray', 'job', 'logs', '--follow', '--address', where, job.id)}"
            ) from error
        return EXIT_CODES.get(str(client.get_job_status(job.id)), 1)

    return job, follow
