"""Recording of a search in MLflow: a search is a parent run, trials are child runs, stages are children of trials.

The records of a trial are uploaded from the journal in the trial's folder, as for a run outside a search. At the end,
the result of the search is recorded in the parent run.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.entities import Metric, Param, Run

from orchestrate.lifecycle import paths
from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.run_status import read_state
from orchestrate.recipes.recipe import build_trial_experiment, load_search
from orchestrate.search.report import build_trial_columns
from orchestrate.search.results import load_search_result
from orchestrate.tracking.mlflow_client import (
    FINGERPRINT,
    FOLDER,
    JOURNAL_POSITION,
    LEVEL,
    MAX_NAME_LENGTH,
    MAX_VALUE_LENGTH,
    REASON,
    clear_reason,
    find_run_of_folder,
    finish_run,
    flatten,
    log_metrics,
    log_table,
    open_store,
    provenance_tags,
    search_runs,
    valid_name,
)
from orchestrate.tracking.store_errors import (
    FAILURES,
    OFFLINE_ADVICE,
    ArtifactError,
    explain_store_errors,
    store_error,
)
from orchestrate.tracking.uploader import FINISH_TIMEOUT, JournalUploader, upload_run
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.redaction import mask
from schemas.results import RunState, SyncReport
from schemas.search import Search, SearchResult, TrialEnded, TrialEvent, TrialStarted
from zscl.sequence.layout import JOURNAL

if TYPE_CHECKING:
    from orchestrate.search.preflight import PreparedSearch

TRIALS_TABLE = "trials.json"
TRIAL_TIMEOUT = 120.0  # seconds to upload the remaining records of a trial that ended, while other trials run


def _read_start_time(folder: Path) -> int | None:
    """Return the start time of the search in a folder, in Unix milliseconds; `None` if none is recorded."""
    if not (folder / paths.FINGERPRINT).is_file():
        return None
    return paths.read_search_identity(folder).started_ms


class SearchRecorder:
    """Records a search in an MLflow store. Every method may raise the exceptions in `store_errors.FAILURES`.

    Attributes:
        client: Client of the MLflow store.
        run_id: Id of the search's MLflow run.
    """

    def __init__(self, search: Search, experiment: str, identity: paths.SearchIdentity, folder: Path, uri: str) -> None:
        """Find the MLflow run of the search, or create it.

        Args:
            search: The search.
            experiment: Name of the MLflow experiment.
            identity: Fingerprint, algorithm version and start time of the search, by which its MLflow run is found.
            folder: The search's folder, absolute.
            uri: Tracking URI.
        """
        self.client, experiment_id = open_store(uri, experiment)
        started = identity.started_ms
        candidates = search_runs(self.client, [experiment_id], identity.fingerprint, ["search"])
        run = find_run_of_folder(candidates, folder, started, _read_start_time)
        self._run = run or self._create_run(search, experiment_id, identity, folder)
        self.run_id = str(self._run.info.run_id)
        self.client.set_tag(self.run_id, FOLDER, mask(str(folder)))  # the folder may have been moved

    def _create_run(self, search: Search, experiment_id: str, identity: paths.SearchIdentity, folder: Path) -> Run:
        started = identity.started_ms
        tags = {
            LEVEL: "search",
            FINGERPRINT: identity.fingerprint,
            FOLDER: mask(str(folder)),
            JOURNAL_POSITION: f"0 since {started}" if started else "0",  # a search has no journal
            "zscl.objectives": ", ".join(search.objectives),
            **provenance_tags(),
            "mlflow.note.content": "Trials are evaluated on held-out training images; `test/…` on the test images.",
        }
        run = self.client.create_run(experiment_id, run_name=folder.name[:MAX_NAME_LENGTH], tags=tags)
        settings = flatten(search.model_dump(mode="json", exclude_none=True))
        params = [Param(valid_name(name), str(value)[:MAX_VALUE_LENGTH]) for name, value in settings]
        self.client.log_batch(run.info.run_id, params=params)
        return run

    def resume(self) -> None:
        """Set the run's status to RUNNING."""
        self.client.update_run(self.run_id, status="RUNNING")
        clear_reason(self.client, self.run_id)

    def finalize(self, folder: Path, files: bool = True) -> str:
        """Read the search's status from its folder and record it in the tracking store.

        The result of a finished search is recorded as well.

        Args:
            folder: The search's folder.
            files: Whether to upload the files of a finished search as artifacts.

        Returns:
            The status of the search: FINISHED, FAILED or KILLED.

        Raises:
            ArtifactError: The artifact store did not accept the files. The status is recorded nevertheless.
        """
        state = read_state(folder)
        if (folder / paths.SEARCH_RESULT).is_file():
            self.finish(load_search_result(folder), folder, files)
            return "FINISHED"
        if state is None or state.status in ("RUNNING", "FINISHED"):  # the process died before it wrote an outcome
            state = RunState(status="KILLED", reason="the process is gone", time=time.time_ns() // 1_000_000)
        self.client.set_tag(self.run_id, REASON, state.reason[:MAX_VALUE_LENGTH])
        self.client.set_terminated(self.run_id, state.status, state.time)
        return state.status

    def finish(self, result: SearchResult, folder: Path, files: bool = True) -> None:
        """Record a finished search: metrics, the table of trials, the recipes and the charts.

        Args:
            result: The search's result.
            folder: The search's folder.
            files: Whether to upload the table, the recipes and the charts as artifacts.

        Raises:
            ArtifactError: The artifact store did not accept the files. Everything else is recorded nevertheless.
        """
        state = read_state(folder)
        end_time = state.time if state and state.status == "FINISHED" else 0
        chosen = result.trials[result.chosen - 1]
        figures = {f"chosen/{name}": value for name, value in chosen.objectives.items()}
        figures |= {f"importance/{path}": value for path, value in result.importance.items()}
        figures |= {f"stage_trainings/{name}": value for name, value in result.stage_trainings.model_dump().items()}
        figures |= {
            f"test/{name}": value for name, value in result.test.metrics.model_dump().items() if value is not None
        }
        metrics = [Metric(name, value, end_time, 0) for name, value in figures.items()]
        for trial in result.trials:
            metrics += [
                Metric(f"trial/{name}", value, end_time, trial.number) for name, value in trial.objectives.items()
            ]
        log_metrics(self.client, self.run_id, metrics)
        self.client.set_tag(self.run_id, "zscl.chosen", str(result.chosen))
        upload = partial(self._upload_files, result, folder) if files else None
        finish_run(self.client, self._run, folder, end_time or None, upload)

    def _upload_files(self, result: SearchResult, folder: Path) -> None:
        """Upload the table of trials, the recipes and the charts."""
        log_table(self.client, self.run_id, build_trial_columns(result), TRIALS_TABLE)
        for file in (paths.SEARCH, paths.SEARCH_RESULT, paths.CHOSEN_RECIPE):
            self.client.log_artifact(self.run_id, str(folder / file))
        for chart in sorted(folder.glob("*.png")):
            self.client.log_artifact(self.run_id, str(chart), "figures")


class SearchUploader:
    """Uploads records of a search and its trials to MLflow in background threads. Only `end` waits for the uploads."""

    def __init__(
        self, prepared: "PreparedSearch", folder: Path, note: Callable[[str], None], identity: paths.SearchIdentity
    ) -> None:
        """Open the store and record that the search is running.

        Args:
            prepared: The checked search.
            folder: The search's folder, absolute.
            note: Called with messages about the store, from any thread.
            identity: Fingerprint, algorithm version and start time of the search, by which its MLflow run is found.

        Raises:
            InputError: The store cannot be reached.
        """
        self._prepared, self._folder, self._note = prepared, folder, note
        experiment = prepared.base.experiment
        self._uri = paths.restore_password(paths.tracking_uri(experiment, folder))
        with explain_store_errors(self._uri, OFFLINE_ADVICE):
            self._recorder = SearchRecorder(
                prepared.search, experiment.tracking.experiment, identity, folder, self._uri
            )
            self._recorder.resume()
        self._uploaders: dict[int, JournalUploader] = {}
        self._end_threads: list[threading.Thread] = []

    def __call__(self, trial_event: TrialEvent) -> None:
        """Start a background upload when a trial starts, and end it when the trial ends. Other events are ignored."""
        number = trial_event.trial
        match trial_event.news:
            case TrialStarted(values=values, fingerprint=fingerprint, folder=folder) if number > 0:
                if number not in self._uploaders:
                    search, content, file = self._prepared.search, self._prepared.content, self._prepared.file
                    self._uploaders[number] = JournalUploader(
                        build_trial_experiment(search, content, values, file),
                        fingerprint,
                        Path(folder),
                        self._note,
                        self._recorder.run_id,
                    )
            case TrialEnded() if number in self._uploaders:
                end = self._uploaders.pop(number).end
                thread = threading.Thread(target=end, args=[TRIAL_TIMEOUT], name="ending", daemon=True)
                thread.start()
                self._end_threads.append(thread)

    def end(self, timeout: float | None = None) -> None:
        """Upload the remaining records of all trials, then record the outcome of the search.

        Args:
            timeout: Maximum time to wait for the uploads, in seconds. The default is proportional to the number
                of unfinished uploads plus one.
        """
        waiting = len(self._uploaders) + sum(thread.is_alive() for thread in self._end_threads)
        timeout = FINISH_TIMEOUT * (1 + waiting) if timeout is None else timeout
        deadline = time.monotonic() + timeout
        self._end_threads += [
            threading.Thread(target=uploader.end, args=[timeout], daemon=True) for uploader in self._uploaders.values()
        ]
        for thread in self._end_threads:
            with suppress(RuntimeError):  # the thread was started before
                thread.start()
        for thread in self._end_threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        try:
            self._recorder.finalize(self._folder)
        except (*FAILURES, ArtifactError) as error:
            reason = error if isinstance(error, ArtifactError) else store_error(self._uri, error)
            sync = shell_command("zscl", "sync", self._folder)
            self._note(f"MLflow has not received everything ({reason}); send the rest later with: {sync}")


def sync_search(folder: Path, uri: str | None, on_sent: Callable[[str, int, int], None]) -> SyncReport:
    """Upload the records of a stopped or finished search that an MLflow store does not have yet.

    Args:
        folder: The search's folder, absolute.
        uri: Tracking URI; default: the URI in the search's recipe.
        on_sent: Called during the upload with the name of a trial's folder, the number of its journal entries that were
            sent, and the total number to send.

    Returns:
        The number of journal entries sent, and the status of the search.

    Raises:
        InputError: A process is running the search, or the store or its artifact store cannot be reached.
    """
    with run_lock(folder, advice="copy the run to such a folder, and sync the copy"):
        search, content = load_search(folder / paths.SEARCH)
        experiment = build_trial_experiment(search, content, {}, folder / paths.SEARCH)
        uri = uri or paths.restore_password(paths.tracking_uri(experiment, folder))
        identity = paths.read_search_identity(folder)
        sent, failure = 0, None
        with explain_store_errors(uri):
            recorder = SearchRecorder(search, experiment.tracking.experiment, identity, folder, uri)
            for journal in sorted((folder / "trials").glob(f"*/{JOURNAL}")):
                run = journal.parent
                report = partial(on_sent, run.name)
                try:
                    sent += upload_run(run, uri, report, recorder.run_id, files=failure is None).entries
                except ArtifactError as error:  # metrics and status of other trials can still be sent
                    failure = error
            try:
                status = recorder.finalize(folder, files=failure is None)
            except ArtifactError as error:
                failure = error
    if failure is not None:
        raise InputError(
            f"{folder}: {failure}; then repeat: {shell_command('zscl', 'sync', folder)}", code=ErrorCode.UNREACHABLE
        ) from failure
    return SyncReport(folder=str(folder), tracking_uri=mask(uri), entries=sent, status=status)
