"""Runs as people name them: by folder, by MLflow's run id, by a search expression."""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrate.lifecycle.paths import EXPERIMENT, LEVELS, sqlite_file, sqlite_uri
from schemas.errors import InputError, did_you_mean
from schemas.redaction import mask
from zscl.runtime.hashing import sha256_of
from zscl.runtime.paths import did_you_mean_path
from zscl.sequence.journal import RunIdentity, identity_of
from zscl.sequence.layout import RESULT

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_ID = re.compile(r"[0-9a-f]{32}")
NEARLY_RUN_ID = re.compile(r"[0-9a-fA-F]{20,}")
MOST_RUNS = 1_000
DOWNLOADED = "zscl-downloaded-"  # beginning of the name of a folder for as long as the comparison takes


def find_runs(given: Sequence[str], where: str | None, uri: str | None) -> dict[str, Path | InputError]:
    """Find where runs lie, by what the user gave, in that order.

    A run of MLflow's is in its folder, as recorded; where that is not on this machine, or holds another run by now, its
    artefacts are downloaded.

    Args:
        given: folders or run ids.
        where: MLflow search expression, whose runs come behind; of a search's or a group's runs, the trials too.
        uri: of the store.

    Returns:
        Each run's folder, by what was given or the run's id; of a run that only the expression found, the reason
            where it has none.

    Raises:
        InputError: nothing was given, something that was given is not there, or the store cannot be reached or
            searched.
    """
    if not given and where is None:
        raise InputError("found no runs, expected folders, run ids, or --where EXPRESSION")
    ids = [name for name in given if RUN_ID.fullmatch(name) and not Path(name).exists()]
    store = _Store(uri) if ids or where is not None else None
    found: dict[str, Path | InputError] = {}
    problems: list[str] = []
    for name in given:
        try:
            found[name] = store.folder(name) if store is not None and name in ids else _folder(name)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    if store is not None and where is not None:
        found |= store.search(where)
    return found


def _folder(name: str) -> Path:
    path = Path(name).expanduser().absolute()
    try:
        if path.exists():
            return path
    except OSError as error:  # below a folder of another user, say
        raise InputError(
            f"{name}: cannot be read ({error.strerror}), expected a run's folder or its id in MLflow"
        ) from (error)
    if NEARLY_RUN_ID.fullmatch(name):
        raise InputError(
            f"{name}: found no such folder and no run id, expected a folder, or the 32 digits (0-9, a-f) of a run's id "
            "in MLflow"
        )
    raise InputError(
        f"{name}: found no such folder, expected a run's folder or its id in MLflow{did_you_mean_path(path)}"
    )


def place_of(found: Mapping[str, Path | InputError]) -> Path:
    """Return the default folder of a comparison: beside the first run, one for each choice of runs in their order.

    Args:
        found: the runs, as of `find`.
    """
    here = {
        given: folder
        for given, folder in found.items()
        if isinstance(folder, Path) and not folder.parent.parent.name.startswith(DOWNLOADED)
    }
    beside = next((folder.parent for folder in here.values()), Path.cwd() / "runs")
    which = [str(here[given].resolve()) if given in here else given for given in found]
    return beside / "comparison" / sha256_of(*which)[:8]


class _Store:
    """MLflow, asked for runs."""

    def __init__(self, uri: str | None) -> None:
        from orchestrate.tracking.mlflow_client import open_client
        from orchestrate.tracking.store_errors import FAILURES, store_error

        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path.cwd() / "runs/mlflow.db")
        self.failures = FAILURES
        try:
            self.file = sqlite_file(self.uri)
            if self.file is not None and not self.file.is_file():
                raise InputError(
                    f"--uri: found no MLflow store at {mask(self.uri)}, expected a server or sqlite:///FILE"
                )
            self.client = open_client(self.uri)
            self.experiments = [each.experiment_id for each in self.client.search_experiments()]
        except FAILURES as error:
            raise store_error(self.uri, error) from error

    def folder(self, run_id: str) -> Path:
        try:
            run = self.client.get_run(run_id)
        except self.failures as error:
            known = [run.info.run_id for run in self._runs("")]
            raise InputError(
                f"{run_id}: found no such run in {mask(self.uri)}, expected a run's id{did_you_mean(run_id, known)}"
            ) from error
        level = run.data.tags.get("zscl.level", "")
        if level not in LEVELS:
            what = {"search": "a whole search", "stage": "a single stage"}.get(level, "a run that is not of zscl")
            parent = run.data.tags.get("mlflow.parentRunId")
            whole = f" (that of its whole run is {parent})" if level == "stage" and parent else ""
            raise InputError(f"{run_id}: found {what}, expected the id of a run over all its stages{whole}")
        return self._folder(run)

    def search(self, where: str) -> dict[str, Path | InputError]:
        try:
            runs = self._runs(where)
        except self.failures as error:
            reason = mask(" ".join(str(error).split()))
            raise InputError(f"--where: found no expression that MLflow takes ({reason})") from error
        found: dict[str, Path | InputError] = {}
        for run in runs:
            if run.data.tags.get("zscl.level") in LEVELS:
                try:
                    found[run.info.run_id] = self._folder(run)
                except InputError as error:
                    found[run.info.run_id] = error
        if not found:
            raise InputError(f"--where {where}: found no run in {mask(self.uri)}, expected some")
        return found

    def _runs(self, where: str) -> "Sequence[Run]":
        return list(
            self.client.search_runs(self.experiments, where, max_results=MOST_RUNS, order_by=["attributes.start_time"])
        )

    def _folder(self, run: "Run") -> Path:
        """Find a run's folder, or download what a comparison needs."""
        from orchestrate.tracking.mlflow_client import FINGERPRINT, start_times

        begun = start_times(run)
        identity = RunIdentity(run.data.tags.get(FINGERPRINT, ""), -1 if begun is None else begun)
        for folder in self._candidates(run):
            if identity_of(folder) == identity:
                return folder
        return self._downloaded(run)

    def _candidates(self, run: "Run") -> Iterator[Path]:
        """Where a run may lie: where it was recorded, and, moved with its store, beside that."""
        from orchestrate.tracking.mlflow_client import FOLDER

        recorded = Path(run.data.tags.get(FOLDER, "/"))
        yield recorded
        if self.file is not None:
            yield self.file.parent / recorded.name

    def _downloaded(self, run: "Run") -> Path:
        from mlflow.artifacts import download_artifacts

        from orchestrate.tracking.local_store import artefacts_now

        which = run.info.run_id
        name = (run.info.run_name or "run").replace("/", "_")
        place = Path(tempfile.mkdtemp(prefix=DOWNLOADED), which[:8], name)
        atexit.register(shutil.rmtree, place.parent.parent, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            location = artefacts_now(run.info.artifact_uri, self.file)
            is_moved = location != run.info.artifact_uri
            for file in (RESULT, EXPERIMENT):
                artefact = f"{location}/{file}" if is_moved else f"runs:/{which}/{file}"
                download_artifacts(artefact, dst_path=str(place), tracking_uri=self.uri)
        except Exception as error:  # whatever a store of artefacts may raise
            reason = mask(" ".join(str(error).split()))
            raise InputError(
                f"{which}: found another run or none in the recorded folder ({next(self._candidates(run))}), and no "
                f"{RESULT} among the run's artefacts, expected one of the two: give the folder in which it lies now; a "
                f"run that is not finished has no {RESULT} yet ({reason})"
            ) from error
        return place
