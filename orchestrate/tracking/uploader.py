"""Upload of a run's journal to MLflow: in the background while the run is in progress, or afterwards (`zscl sync`).

The journal is the source of truth. The store records how many of its entries were sent, so an upload resumes where the
previous upload stopped, and an empty store receives the complete journal.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.paths import restore_password, tracking_uri
from orchestrate.lifecycle.run_status import read_state
from orchestrate.recipes.recipe import load_experiment
from orchestrate.reports.results import load_result
from orchestrate.tracking.run_recorder import RunRecorder
from orchestrate.tracking.store_errors import (
    FAILURES,
    OFFLINE_ADVICE,
    ArtifactError,
    explain_store_errors,
    root_cause,
    store_error,
)
from schemas.errors import ErrorCode, InputError, shell_command
from schemas.events import JournalEntry, RunStarted
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import RunState, SyncReport
from zscl.sequence.journal import JournalReader
from zscl.sequence.layout import EXPERIMENT, JOURNAL, RESULT

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
RETRY_DELAYS = (1.0, 30.0)  # first and largest delay in seconds; the delay doubles after every failure
FINISH_TIMEOUT = 20.0  # seconds to wait for the upload at the end of a run
ENTRIES_PER_BATCH = 100  # about two minutes of a run; small, because a batch is sent again after a failure


class UploadSession:
    """An upload of a run's journal to a tracking store. To retry after an exception, a new session must be created.

    Attributes:
        folder: The run's folder.
        recorder: The recorder of the run in the store.
    """

    def __init__(
        self, experiment: Experiment, fingerprint: str, folder: Path, uri: str, search_run_id: str | None = None
    ) -> None:
        self.folder = folder
        self._reader = JournalReader(folder / JOURNAL)
        self._pending: list[JournalEntry] = []
        self._last_time = 0
        self._read_journal()
        start_time = self._pending[0].time if self._pending else None
        self.recorder = RunRecorder(experiment, fingerprint, folder, uri, start_time, search_run_id)
        del self._pending[: self.recorder.position]

    def send(self) -> Iterator[tuple[int, int]]:
        """Send the journal entries that the store does not contain yet, in batches.

        Yields:
            After each batch, the number of entries that were sent so far, and the total number of entries to send.
        """
        self._read_journal()
        total = len(self._pending)
        while self._pending:
            self.recorder.send(self._pending[:ENTRIES_PER_BATCH])
            del self._pending[:ENTRIES_PER_BATCH]
            yield total - len(self._pending), total

    def finalize(self, files: bool = True) -> str:
        """Read the run's status from its folder, and record it in the tracking store as the final status.

        Args:
            files: Whether to upload the files of a finished run.

        Returns:
            The run's status.

        Raises:
            ArtifactError: The status is recorded, but the artifact store did not accept the files.
        """
        state = read_state(self.folder)
        if (self.folder / RESULT).is_file():
            end_time = state.time if state and state.status == "FINISHED" else self._last_time
            self.recorder.finish(load_result(self.folder), self._last_time, end_time, files)
            return "FINISHED"
        if state is None or state.status == "RUNNING":  # the process was killed before it wrote a final status
            state = RunState(status="KILLED", reason="the process ended unexpectedly", time=self._last_time)
        self.recorder.fail(state)
        return state.status

    def _read_journal(self) -> None:
        entries = self._reader.read_new()
        self._pending += entries
        self._last_time = entries[-1].time if entries else self._last_time


class JournalUploader:
    """Uploader of a run's journal. It uploads from a background thread while the run is in progress.

    Attributes:
        folder: The run's folder.
        run_id: ID of the MLflow run. A trial of a search does not have this attribute.
    """

    def __init__(
        self,
        experiment: Experiment,
        fingerprint: str,
        folder: Path,
        note: Callable[[str], None],
        search_run_id: str | None = None,
    ) -> None:
        """Open the store, find or create the run in it, and start the thread.

        Args:
            experiment: The run's experiment.
            fingerprint: The experiment's fingerprint.
            folder: The absolute path of the run's folder.
            note: Called with a message for the user when the store stops accepting records, and when it accepts
                records again. The background thread makes these calls.
            search_run_id: ID of the search's MLflow run; `None` if this run is not a trial of a search. For a trial,
                the thread opens the store and retries after a failure, because the search has already used the store.

        Raises:
            InputError: The store cannot be used.
        """
        self.folder, self._note = folder, note
        self._uri = restore_password(tracking_uri(experiment, folder if search_run_id is None else folder.parents[1]))
        self._failure, self._reported_failure = "", ""
        self._open_session = partial(_open_session, experiment, fingerprint, folder, self._uri, search_run_id)
        session = None
        if search_run_id is None:
            with explain_store_errors(self._uri, OFFLINE_ADVICE):
                session = self._open_session()
                self.run_id = session.recorder.run_id
        self._finishing, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._upload, args=[session], name="journal-uploader", daemon=True)
        self._thread.start()

    def end(self, timeout: float = FINISH_TIMEOUT) -> bool:
        """Upload the remaining journal entries and the run's final status, which is read from the run's folder.

        Args:
            timeout: Seconds to wait. After a timeout, `note` is called with the command that uploads the rest.

        Returns:
            Whether everything was uploaded.
        """
        self._finishing.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._cancelled.set()
            reason = f" ({self._failure})" if self._failure != self._reported_failure else ""
            sync = shell_command("zscl", "sync", self.folder)
            self._note(f"MLflow has not accepted all records yet{reason}; later, send the rest with: {sync}")
        return not self._thread.is_alive()

    def _upload(self, session: UploadSession | None) -> None:
        """Send new entries periodically. After a failure, retry in a new session with exponential backoff."""
        delay, is_failing = RETRY_DELAYS[0], False
        while not self._cancelled.is_set():
            finishing = self._finishing.is_set()  # checked before the journal is read, so that no entry is missed
            is_new_session = session is None
            try:
                session = session or self._open_session()
                for _ in session.send():
                    if self._cancelled.is_set():
                        return
                if finishing:
                    session.finalize()
            except Exception as error:  # the client libraries of artifact stores raise errors of any type
                session = None
                log.debug("MLflow did not accept records", exc_info=True)
                # If a run or an experiment was deleted, only the error of opening a session explains it.
                if not is_new_session:
                    continue
                self._failure = self._explain(error)
                if not is_failing:
                    reassurance = "" if finishing else ". The run continues, and its journal keeps the records"
                    self._note(f"MLflow does not accept records: {self._failure}{reassurance}")
                    self._reported_failure = self._failure
                wait, delay, is_failing = delay, min(2 * delay, RETRY_DELAYS[1]), True
            else:
                if is_failing:
                    self._note("MLflow accepts records again; nothing is lost")
                self._failure = ""
                if finishing:
                    return
                wait, delay, is_failing = POLL_SECONDS, RETRY_DELAYS[0], False
            if finishing:
                time.sleep(min(wait, RETRY_DELAYS[0]))
            else:
                self._finishing.wait(wait)

    def _explain(self, error: Exception) -> str:
        """Return the reason why MLflow does not accept records."""
        if isinstance(error, (*FAILURES, InputError)):
            return str(store_error(self._uri, error))
        return str(error) if isinstance(error, ArtifactError) else root_cause(error, self._uri)


def _open_session(
    experiment: Experiment, fingerprint: str, folder: Path, uri: str, search_run_id: str | None
) -> UploadSession:
    session = UploadSession(experiment, fingerprint, folder, uri, search_run_id)
    if session.recorder.status != "FINISHED":
        session.recorder.resume()
    return session


def sync_run(folder: Path, uri: str | None, on_sent: Callable[[int, int], None]) -> SyncReport:
    """Upload the records and files of a run that a store does not have yet. The run must not be in progress.

    Args:
        folder: The run's folder.
        uri: Tracking URI; default: the URI in the run's recipe.
        on_sent: Called after each batch of journal entries with the number of entries that were sent so far, and the
            total number of entries to send.

    Returns:
        The run's folder and status, the tracking URI, and the number of journal entries that were sent.

    Raises:
        InputError: The run does not exist or is in progress, or its tracking store or artifact store cannot be used.
    """
    try:
        return upload_run(folder, uri, on_sent)
    except ArtifactError as error:
        message = f"{folder}: {error}; then repeat: {shell_command('zscl', 'sync', folder)}"
        raise InputError(message, code=ErrorCode.REJECTED) from error


def upload_run(
    folder: Path,
    uri: str | None,
    on_sent: Callable[[int, int], None],
    search_run_id: str | None = None,
    files: bool = True,
) -> SyncReport:
    """Upload the records and files of a run, or of a trial of a search, that a store does not have yet.

    Args:
        folder: See `sync_run`.
        uri: See `sync_run`.
        on_sent: See `sync_run`.
        search_run_id: ID of the search's MLflow run; `None` if this run is not a trial of a search.
        files: Whether to upload the files of a finished run.

    Returns:
        The run's folder and status, the tracking URI, and the number of journal entries that were sent.

    Raises:
        ArtifactError: The files could not be uploaded. Everything else is recorded.
        InputError: The run does not exist or is in progress, or its tracking store cannot be used.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder, expected a run's folder", code=ErrorCode.NOT_FOUND)
    with run_lock(folder, advice="copy the run to a writable folder, and sync the copy"):
        fingerprint = _read_fingerprint(folder)
        experiment = load_experiment(folder / EXPERIMENT)
        uri = uri or restore_password(tracking_uri(experiment, folder))
        with explain_store_errors(uri):
            session = UploadSession(experiment, fingerprint, folder, uri, search_run_id)
            sent = 0
            for sent, total in session.send():
                on_sent(sent, total)
            is_up_to_date = session.recorder.is_complete and not sent
            status = "FINISHED" if is_up_to_date else session.finalize(files)
    return SyncReport(folder=str(folder), tracking_uri=mask(uri), entries=sent, status=status)


def _read_fingerprint(folder: Path) -> str:
    for entry in reversed(JournalReader(folder / JOURNAL).read_new()):
        if isinstance(entry.progress, RunStarted):
            return entry.progress.fingerprint
    raise InputError(
        f"{folder}: found no {JOURNAL} with a started run, expected the folder of a run that was started",
        code=ErrorCode.NOT_FOUND,
    )
