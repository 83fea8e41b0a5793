"""Lookup of runs by folder, by MLflow run ID or by an MLflow search expression."""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrate.lifecycle.paths import RUN_LEVELS, sqlite_file, sqlite_uri
from schemas.errors import ErrorCode, InputError, did_you_mean
from schemas.redaction import mask
from zscl.runtime.hashing import sha256_of
from zscl.runtime.paths import did_you_mean_path
from zscl.sequence.journal import RunIdentity, read_run_identity
from zscl.sequence.layout import EXPERIMENT, RESULT

if TYPE_CHECKING:
    from mlflow.entities import Run

RUN_ID = re.compile(r"[0-9a-f]{32}")
SIMILAR_TO_RUN_ID = re.compile(r"[0-9a-fA-F]{20,}")
MAX_RUNS = 1_000
DOWNLOAD_PREFIX = "zscl-downloaded-"  # the prefix of temporary folders


def find_runs(names: Sequence[str], where: str | None, uri: str | None) -> dict[str, Path | InputError]:
    """Find the folders of runs.

    For an MLflow run ID, the folder is the one that MLflow records. If this folder is not on this machine, or contains
    another run, the run's artifacts are downloaded to a temporary folder.

    Args:
        names: Folders or MLflow run IDs.
        where: MLflow search expression. The selected runs, including trials of searches, are appended to `names`.
        uri: Tracking URI; default: MLFLOW_TRACKING_URI, else `runs/mlflow.db`.

    Returns:
        The folders by name, then by the run ID of every run that `where` selects. If no folder can be found or
            downloaded for a selected run, the value is an error.

    Raises:
        InputError: There are neither names nor an expression, a name does not exist, or the store cannot be reached or
            searched.
    """
    if not names and where is None:
        raise InputError(
            "found no runs, expected folders, run ids, or --where EXPRESSION", code=ErrorCode.MISSING_VALUE
        )
    ids = [name for name in names if RUN_ID.fullmatch(name) and not Path(name).exists()]
    store = _Store(uri) if ids or where is not None else None
    folders: dict[str, Path | InputError] = {}
    errors: list[InputError] = []
    for name in names:
        try:
            folders[name] = store.find(name) if store is not None and name in ids else _existing_folder(name)
        except InputError as error:
            errors.append(error)
    if errors:
        raise InputError("\n".join(map(str, errors)), code=errors[0].code, field=errors[0].field)
    if store is not None and where is not None:
        folders |= store.search(where)
    return folders


def _existing_folder(name: str) -> Path:
    path = Path(name).expanduser().absolute()
    try:
        if path.exists():
            return path
    except OSError as error:  # for example in a folder of another user
        raise InputError(
            f"{name}: cannot be read ({error.strerror}), expected a run's folder or its id in MLflow",
            code=ErrorCode.NOT_FOUND,
        ) from error
    if SIMILAR_TO_RUN_ID.fullmatch(name):
        raise InputError(
            f"{name}: found no such folder, and this is not a run id; expected a folder, or a run's id in MLflow with "
            "32 digits (0-9, a-f)",
            code=ErrorCode.NOT_FOUND,
        )
    raise InputError(
        f"{name}: found no such folder, expected a run's folder or its id in MLflow{did_you_mean_path(path)}",
        code=ErrorCode.NOT_FOUND,
    )


def comparison_folder(folders: Mapping[str, Path | InputError]) -> Path:
    """Return the default output folder of a comparison. Its name is a hash of the runs in their order.

    Args:
        folders: The result of `find_runs`.

    Returns:
        A folder next to the folder of the first run. The returned folder need not exist.
    """
    local = {
        name: folder
        for name, folder in folders.items()
        if isinstance(folder, Path) and not folder.parent.parent.name.startswith(DOWNLOAD_PREFIX)
    }
    parent = next((folder.parent for folder in local.values()), Path.cwd() / "runs")
    identities = [str(local[name].resolve()) if name in local else name for name in folders]
    return parent / "comparison" / sha256_of(*identities)[:8]


class _Store:
    """A tracking store, in which runs are looked up by run ID or by search expression."""

    def __init__(self, uri: str | None) -> None:
        from orchestrate.tracking.mlflow_client import open_client
        from orchestrate.tracking.store_errors import FAILURES, explain_store_errors

        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path.cwd() / "runs/mlflow.db")
        self.failures = FAILURES
        with explain_store_errors(self.uri):
            self.file = sqlite_file(self.uri)
            if self.file is not None and not self.file.is_file():
                raise InputError(
                    f"--uri: found no MLflow store at {mask(self.uri)}, expected a server or sqlite:///FILE",
                    code=ErrorCode.NOT_FOUND,
                    field="--uri",
                )
            self.client = open_client(self.uri)
            self.experiment_ids = [experiment.experiment_id for experiment in self.client.search_experiments()]

    def find(self, run_id: str) -> Path:
        """Return the folder of the run with this ID."""
        try:
            run = self.client.get_run(run_id)
        except self.failures as error:
            run_ids = [run.info.run_id for run in self._search("")]
            raise InputError(
                f"{run_id}: found no such run in {mask(self.uri)}, expected a run's id{did_you_mean(run_id, run_ids)}",
                code=ErrorCode.NOT_FOUND,
            ) from error
        level = run.data.tags.get("zscl.level", "")
        if level not in RUN_LEVELS:
            kind = {"search": "a search", "stage": "a single stage"}.get(level, "a run that zscl did not create")
            parent = run.data.tags.get("mlflow.parentRunId")
            hint = f"; the id of this stage's run is {parent}" if level == "stage" and parent else ""
            raise InputError(
                f"{run_id}: found {kind}, expected the id of a complete run{hint}",
                code=ErrorCode.UNSUPPORTED,
            )
        return self._folder_of(run)

    def search(self, where: str) -> dict[str, Path | InputError]:
        """Return the folder of every run that an expression selects, or an error if the folder cannot be found."""
        try:
            runs = self._search(where)
        except self.failures as error:
            reason = mask(" ".join(str(error).split()))
            raise InputError(
                f"--where: MLflow does not accept this expression ({reason})",
                code=ErrorCode.INVALID_VALUE,
                field="--where",
            ) from error
        folders: dict[str, Path | InputError] = {}
        for run in runs:
            if run.data.tags.get("zscl.level") in RUN_LEVELS:
                try:
                    folders[run.info.run_id] = self._folder_of(run)
                except InputError as error:
                    folders[run.info.run_id] = error
        if not folders:
            raise InputError(
                f"--where {where}: found no run in {mask(self.uri)}, expected at least one",
                code=ErrorCode.NOT_FOUND,
                field="--where",
            )
        return folders

    def _search(self, where: str) -> "Sequence[Run]":
        return list(
            self.client.search_runs(
                self.experiment_ids, where, max_results=MAX_RUNS, order_by=["attributes.start_time"]
            )
        )

    def _folder_of(self, run: "Run") -> Path:
        """Return the run's folder if it is on this machine, or a temporary folder with the run's artifacts."""
        from orchestrate.tracking.mlflow_client import FINGERPRINT, recorded_start_time

        start_time = recorded_start_time(run)
        identity = RunIdentity(run.data.tags.get(FINGERPRINT, ""), -1 if start_time is None else start_time)
        for folder in self._candidates(run):
            if read_run_identity(folder) == identity:
                return folder
        return self._download(run)

    def _candidates(self, run: "Run") -> Iterator[Path]:
        """Yield the folders that may contain a run.

        Yields:
            The folder that MLflow records, then the folder of the same name next to an SQLite store. The run is in the
            second folder if it was moved together with the store.
        """
        from orchestrate.tracking.mlflow_client import FOLDER

        recorded = Path(run.data.tags.get(FOLDER, "/"))
        yield recorded
        if self.file is not None:
            yield self.file.parent / recorded.name

    def _download(self, run: "Run") -> Path:
        """Download the files that a comparison needs to a temporary folder, which is deleted when the process exits."""
        from mlflow.artifacts import download_artifacts

        from orchestrate.tracking.local_store import current_artifact_uri

        run_id = run.info.run_id
        name = (run.info.run_name or "run").replace("/", "_")
        folder = Path(tempfile.mkdtemp(prefix=DOWNLOAD_PREFIX), run_id[:8], name)
        atexit.register(shutil.rmtree, folder.parent.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            location = current_artifact_uri(run.info.artifact_uri, self.file)
            is_moved = location != run.info.artifact_uri
            for file in (RESULT, EXPERIMENT):
                artifact_uri = f"{location}/{file}" if is_moved else f"runs:/{run_id}/{file}"
                download_artifacts(artifact_uri, dst_path=str(folder), tracking_uri=self.uri)
        except Exception as error:  # the client libraries of artifact stores raise errors of any type
            reason = mask(" ".join(str(error).split()))
            raise InputError(
                f"{run_id}: the recorded folder {next(self._candidates(run))} does not contain this run, and its "
                f"MLflow artifacts contain no {RESULT}. Give the run's current folder, or wait until the run has "
                f"finished ({reason})",
                code=ErrorCode.NOT_FOUND,
            ) from error
        return folder
