"""MLflow: a search is a parent, its trials are children, and their stages children of these.

Trials are sent from their journals, as any run's; the search's own run gets what was found in the end.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.entities import Metric, Param

from orchestrate.lifecycle import paths as places
from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.run_status import read_state
from orchestrate.recipes.recipe import load_search, with_values
from orchestrate.search.report import trial_columns
from orchestrate.search.results import load_search_result
from orchestrate.tracking.mlflow_client import (
    ARTIFACTS,
    FINGERPRINT,
    FOLDER,
    LEVEL,
    LONGEST_NAME,
    LONGEST_VALUE,
    REASON,
    TAKEN,
    clear_reason,
    find_recorded,
    flatten,
    log_metrics,
    log_table,
    open_store,
    provenance,
    runs_of,
    valid_name,
)
from orchestrate.tracking.store_errors import FAILURES, OFFLINE, ArtifactError, artifact_error, store_error
from orchestrate.tracking.uploader import PATIENCE_SECONDS, JournalUploader, upload_run
from schemas.errors import InputError, command
from schemas.redaction import mask
from schemas.results import RunState, Synced
from schemas.search import Search, SearchResult, TrialEnded, TrialNews, TrialStarted
from zscl.sequence.journal import JOURNAL

if TYPE_CHECKING:
    from orchestrate.search.preflight import PreparedSearch

TABLE = "trials.json"
TRIAL_SECONDS = 120.0  # for a trial's records to arrive, beside what goes on


def _begun_in(folder: Path) -> int | None:
    """Return when the search in a folder began, if there is one and it says so."""
    if not (folder / places.FINGERPRINT).is_file():
        return None
    return places.search_identity(folder).begun


class SearchRecorder:
    """A search in a store. Every method raises one of `store_errors.FAILURES` where the store does not answer."""

    def __init__(
        self, search: Search, experiment: str, identity: places.SearchIdentity, folder: Path, uri: str
    ) -> None:
        """Find the search in the store, or make it.

        Args:
            search: what is looked for.
            experiment: of MLflow's.
            identity: of the search.
            folder: of the search, absolute.
            uri: of the store.
        """
        self.search = search
        self.client, self.experiment_id = open_store(uri, experiment)
        known, begun = runs_of(self.client, [self.experiment_id], identity.fingerprint, ["search"]), identity.begun
        found = find_recorded(known, folder, begun, _begun_in)
        if found is None:
            tags = {
                LEVEL: "search",
                FINGERPRINT: identity.fingerprint,
                FOLDER: mask(str(folder)),
                TAKEN: f"0 since {begun}" if begun else "0",  # of a journal: a search has none
                "zscl.objectives": ", ".join(search.objectives),
                **provenance(),
                "mlflow.note.content": "Trials are judged on held-out training images; `test/…` on the test images.",
            }
            found = self.client.create_run(self.experiment_id, run_name=folder.name[:LONGEST_NAME], tags=tags)
            given = flatten(search.model_dump(mode="json", exclude_none=True))
            self.client.log_batch(
                found.info.run_id,
                params=[Param(valid_name(name), str(value)[:LONGEST_VALUE]) for name, value in given],
            )
        self.run_id = str(found.info.run_id)
        self._uri, self._artifacts = uri, str(found.info.artifact_uri)
        self.status = str(found.info.status)
        self.client.set_tag(self.run_id, FOLDER, mask(str(folder)))  # it may have been moved

    def resume(self) -> None:
        """Say that the search is under way."""
        self.client.update_run(self.run_id, status="RUNNING")
        clear_reason(self.client, self.run_id)

    def finalize(self, folder: Path, files: bool = True) -> str:
        """Record how the search stands, as its folder says. Returns the status.

        Args:
            folder: Of the search.
            files: Also send the files of a search that is finished.

        Raises:
            ArtifactError: The status is recorded, but the artefact store does not take the files.
        """
        state = read_state(folder)
        if (folder / places.FOUND).is_file():
            self.finish(load_search_result(folder), folder, files)
            return "FINISHED"
        if state is None or state.status in ("RUNNING", "FINISHED"):  # and yet nobody works on it
            state = RunState(status="KILLED", reason="the process is gone", time=time.time_ns() // 1_000_000)
        self.client.set_tag(self.run_id, REASON, state.reason[:LONGEST_VALUE])
        self.client.set_terminated(self.run_id, state.status, state.time)
        return state.status

    def finish(self, found: SearchResult, folder: Path, files: bool = True) -> None:
        """Record table, pictures, importances and the chosen recipe, and close the run.

        Args:
            found: What the search found.
            folder: Of the search.
            files: Also send what belongs into the artefact store.

        Raises:
            ArtifactError: All but the files is recorded.
        """
        ended = read_state(folder)
        now = ended.time if ended and ended.status == "FINISHED" else 0
        chosen = found.trials[found.chosen - 1]
        figures = {f"chosen/{name}": value for name, value in chosen.objectives.items()}
        figures |= {f"importance/{path}": value for path, value in found.importance.items()}
        figures |= {f"stage_trainings/{name}": value for name, value in found.stage_trainings.model_dump().items()}
        figures |= {
            f"test/{name}": value for name, value in found.test.metrics.model_dump().items() if value is not None
        }
        metrics = [Metric(name, value, now, 0) for name, value in figures.items()]
        for trial in found.trials:
            metrics += [Metric(f"trial/{name}", value, now, trial.number) for name, value in trial.objectives.items()]
        log_metrics(self.client, self.run_id, metrics)
        self.client.set_tag(self.run_id, "zscl.chosen", str(found.chosen))
        clear_reason(self.client, self.run_id)
        # The status comes before the files: their store may be another one, which does not answer.
        sync = command("zscl", "sync", folder)
        self.client.set_tag(self.run_id, ARTIFACTS, f"not sent yet; this command sends them: {sync}"[:LONGEST_VALUE])
        self.client.set_terminated(self.run_id, "FINISHED", now or None)
        if not files:
            return
        try:
            self._log_files(found, folder)
        except Exception as error:  # whatever the library of an artefact store raises
            told = artifact_error(self._uri, self._artifacts, error)
            self.client.set_tag(self.run_id, ARTIFACTS, str(told)[:LONGEST_VALUE])
            raise told from error
        self.client.delete_tag(self.run_id, ARTIFACTS)

    def _log_files(self, found: SearchResult, folder: Path) -> None:
        """Record the table of trials, the recipes and the pictures."""
        log_table(self.client, self.run_id, trial_columns(found), TABLE)
        for file in (places.SEARCH, places.FOUND, places.CHOSEN):
            self.client.log_artifact(self.run_id, str(folder / file))
        for picture in sorted(folder.glob("*.png")):
            self.client.log_artifact(self.run_id, str(picture), "figures")


class SearchUploader:
    """Sends a search and its trials while it goes on; nobody waits for it until the end."""

    def __init__(
        self, prepared: "PreparedSearch", folder: Path, note: Callable[[str], None], identity: places.SearchIdentity
    ) -> None:
        """Open the store.

        Raises:
            InputError: it cannot be reached.
        """
        self._prepared, self._folder, self._note = prepared, folder, note
        experiment = prepared.base.experiment
        uri = places.restore_password(places.store_uri(experiment, folder))
        try:
            self._record = SearchRecorder(prepared.search, experiment.tracking.experiment, identity, folder, uri)
            self._record.resume()
        except (*FAILURES, InputError) as error:
            raise store_error(uri, error, OFFLINE) from error
        self._uri = uri
        self._shippers: dict[int, JournalUploader] = {}
        self._ending: list[threading.Thread] = []

    def __call__(self, told: TrialNews) -> None:
        """Follow a trial from its start to its end."""
        match told.news:
            case TrialStarted(values=values, fingerprint=fingerprint, folder=folder) if told.trial > 0:
                if told.trial not in self._shippers:
                    prepared = self._prepared
                    experiment = with_values(prepared.search, prepared.content, values, prepared.file)
                    self._shippers[told.trial] = JournalUploader(
                        experiment, fingerprint, Path(folder), self._note, self._record.run_id
                    )
            case TrialEnded() if told.trial in self._shippers:
                shipper = self._shippers.pop(told.trial)
                thread = threading.Thread(target=shipper.end, args=[TRIAL_SECONDS], name="ending", daemon=True)
                thread.start()
                self._ending.append(thread)

    def end(self, patience: float | None = None) -> None:
        """Let everything arrive, and with it how the search ended, which the folder says by now.

        Args:
            patience: seconds to wait for all of it; default: more for more trials whose records are under way.
        """
        waiting = len(self._shippers) + sum(thread.is_alive() for thread in self._ending)
        patience = PATIENCE_SECONDS * (1 + waiting) if patience is None else patience
        deadline = time.monotonic() + patience
        self._ending += [
            threading.Thread(target=shipper.end, args=[patience], daemon=True) for shipper in self._shippers.values()
        ]
        for thread in self._ending:
            with suppress(RuntimeError):  # it is started already
                thread.start()
        for thread in self._ending:
            thread.join(max(0.0, deadline - time.monotonic()))
        try:
            self._record.finalize(self._folder)
        except (*FAILURES, ArtifactError) as error:
            why = error if isinstance(error, ArtifactError) else store_error(self._uri, error)
            rest = command("zscl", "sync", self._folder)
            self._note(f"MLflow has not taken everything ({why}); later, send the rest with: {rest}")


def sync_search(folder: Path, uri: str | None, on_sent: Callable[[str, int, int], None]) -> Synced:
    """Send what a store does not have yet of a search on which nobody works.

    Args:
        folder: the search's, absolute.
        uri: of the store; default: that of its recipe.
        on_sent: told how far it is: what is sent, entries sent, and to be sent.

    Raises:
        InputError: it is under way, or the store or its artefact store cannot be reached.
    """
    with run_lock(folder, advice="copy the run to such a folder, and sync the copy"):
        search, content = load_search(folder / places.SEARCH)
        experiment = with_values(search, content, {}, folder / places.SEARCH)
        uri = uri or places.restore_password(places.store_uri(experiment, folder))
        identity = places.search_identity(folder)
        sent, failure = 0, None
        try:
            record = SearchRecorder(search, experiment.tracking.experiment, identity, folder, uri)
            for trial in sorted((folder / "trials").glob(f"*/{JOURNAL}")):
                told = partial(on_sent, trial.parent.name)
                try:
                    sent += upload_run(trial.parent, uri, told, record.run_id, files=failure is None).entries
                except ArtifactError as error:  # the others' metrics and status may be sent nevertheless
                    failure = error
            status = record.finalize(folder, files=failure is None)
        except ArtifactError as error:
            failure = error
        except FAILURES as error:
            raise store_error(uri, error) from error
    if failure is not None:
        raise InputError(f"{folder}: {failure}; then repeat: {command('zscl', 'sync', folder)}") from failure
    return Synced(folder=str(folder), tracking_uri=mask(uri), entries=sent, status=status)
