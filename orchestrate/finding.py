"""Runs as people name them: by folder, by MLflow's run id, by a search expression."""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrate.places import EXPERIMENT, SQLITE
from schemas.base import InputError
from schemas.secrets import mask
from zscl.sequence import RESULT

RUN_ID = re.compile(r"[0-9a-f]{32}")
MOST_RUNS = 1_000
FOLDER = "zscl.folder"


def find(given: Sequence[str], where: str | None, uri: str | None) -> dict[str, Path | InputError]:
    """Where the runs lie, or why there is none, by what the user gave, in that order.

    A run of MLflow's is its folder, as recorded; where that is not on this machine, its artefacts are downloaded.

    Args:
        given: folders or run ids.
        where: MLflow search expression, whose runs come behind; of a search's or a group's runs, the trials too.
        uri: of the store.

    Raises:
        InputError: nothing was given, or the store cannot be reached or searched.
    """
    if not given and where is None:
        raise InputError("found no runs, expected folders, run ids, or --where EXPRESSION")
    ids = [name for name in given if RUN_ID.fullmatch(name) and not Path(name).exists()]
    store = _Store(uri) if ids or where is not None else None
    found: dict[str, Path | InputError] = {}
    for name in given:
        found[name] = store.folder(name) if store is not None and name in ids else Path(name).absolute()
    if store is not None and where is not None:
        found |= store.search(where)
    return found


class _Store:
    """MLflow, asked for runs."""

    def __init__(self, uri: str | None) -> None:
        from mlflow.tracking import MlflowClient

        from orchestrate.store_errors import FAILURES, store_error

        default = f"{SQLITE}{Path.cwd() / 'runs/mlflow.db'}"
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or default
        if self.uri.startswith(SQLITE) and not Path(self.uri.removeprefix(SQLITE)).is_file():
            raise InputError(f"--uri: found no MLflow store at {mask(self.uri)}, expected a server or sqlite:///FILE")
        self.failures = FAILURES
        try:
            self.client = MlflowClient(tracking_uri=self.uri)
            self.experiments = [each.experiment_id for each in self.client.search_experiments()]
        except FAILURES as error:
            raise store_error(self.uri, error) from error

    def folder(self, run_id: str) -> Path | InputError:
        try:
            return self._folder(self.client.get_run(run_id))
        except self.failures:
            return InputError(f"{run_id}: found no such run in {mask(self.uri)}, expected a run's id")

    def search(self, where: str) -> dict[str, Path]:
        levels = ("sequence", "trial")
        try:
            runs = self.client.search_runs(
                self.experiments, where, max_results=MOST_RUNS, order_by=["attributes.start_time"]
            )
        except self.failures as error:
            reason = mask(" ".join(str(error).split()))[:300]
            raise InputError(f"--where: found no expression that MLflow takes ({reason})") from error
        found = {run.info.run_id: self._folder(run) for run in runs if run.data.tags.get("zscl.level") in levels}
        if not found:
            raise InputError(f"--where {where}: found no run in {mask(self.uri)}, expected some")
        return found

    def _folder(self, run: Any) -> Path:
        folder = Path(run.data.tags.get(FOLDER, ""))
        if run.data.tags.get(FOLDER) and folder.is_dir():
            return folder
        from mlflow.artifacts import download_artifacts

        place = Path(tempfile.mkdtemp(prefix="zscl-"), run.info.run_name)  # for as long as the comparison takes
        atexit.register(shutil.rmtree, place.parent, ignore_errors=True)
        place.mkdir()
        for name in (RESULT, EXPERIMENT):
            download_artifacts(run_id=run.info.run_id, artifact_path=name, dst_path=str(place), tracking_uri=self.uri)
        return place
