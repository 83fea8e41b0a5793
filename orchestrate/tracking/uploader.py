"""From a run's journal to MLflow: beside a run that goes on, or afterwards.

The journal is what counts. A store takes it entry by entry and says how many it has, so whoever sends goes on where the
last one stopped, and a store that has nothing gets everything.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.paths import restore_password, store_uri
from orchestrate.lifecycle.run_status import read_state
from orchestrate.recipes.recipe import load_experiment
from orchestrate.reports.results import load_result
from orchestrate.tracking.run_recorder import RunRecorder
from orchestrate.tracking.store_errors import FAILURES, OFFLINE, ArtifactError, reason_of, store_error
from schemas.errors import InputError, command
from schemas.events import JournalEntry, RunStarted
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import RunState, Synced
from zscl.sequence.journal import JOURNAL, JournalReader

log = logging.getLogger(__name__)

EVERY_SECONDS = 2.0
PAUSES = (1.0, 30.0)  # after a failure, doubling from the first to the last
PATIENCE_SECONDS = 20.0  # at the end of a run
ENTRIES_AT_ONCE = 100  # about two minutes of steps: little is sent again after a failure


class UploadSession:
    """A journal on its way into a store. After a failure, begin another one: nothing is known but what they say."""

    def __init__(
        self, experiment: Experiment, fingerprint: str, folder: Path, uri: str, search: str | None = None
    ) -> None:
        self.folder = folder
        self._reader = JournalReader(folder / JOURNAL)
        self._waiting: list[JournalEntry] = []
        self._last = 0
        self._read()
        begun = self._waiting[0].time if self._waiting else None
        self.record = RunRecorder(experiment, fingerprint, folder, uri, begun, search)
        del self._waiting[: self.record.taken]

    def send(self) -> Iterator[tuple[int, int]]:
        """Send what is new, a part at a time. Yields how many entries are sent by then, and how many there were."""
        self._read()
        total = len(self._waiting)
        while self._waiting:
            self.record.send(self._waiting[:ENTRIES_AT_ONCE])
            del self._waiting[:ENTRIES_AT_ONCE]
            yield total - len(self._waiting), total

    def finalize(self, files: bool = True) -> str:
        """Record how the run ended, as its folder says. Returns the status.

        Args:
            files: Also send the files of a run that is finished.

        Raises:
            ArtifactError: The status is recorded, but the artefact store does not take the files.
        """
        state = read_state(self.folder)
        if (self.folder / "result.json").is_file():
            ended = state.time if state and state.status == "FINISHED" else self._last
            self.record.finish(load_result(self.folder), self.folder, self._last, ended, files)
            return "FINISHED"
        if state is None or state.status == "RUNNING":  # and yet nobody works on it
            state = RunState(status="KILLED", reason="the process is gone", time=self._last)
        self.record.close(state)
        return state.status

    def _read(self) -> None:
        entries = self._reader.new()
        self._waiting += entries
        self._last = entries[-1].time if entries else self._last


class JournalUploader:
    """Sends a run's journal while the run goes on, from a thread of its own, which nobody waits for until the end."""

    def __init__(
        self,
        experiment: Experiment,
        fingerprint: str,
        folder: Path,
        note: Callable[[str], None],
        search: str | None = None,
    ) -> None:
        """Open the store, where a resumed run is found again.

        Args:
            experiment: what is run.
            fingerprint: of it.
            folder: the run's, absolute.
            note: is told, in the thread, when the store does not answer any more, and when it does again.
            search: the run, in the store, of the search that this one is a trial of. It has seen the store: one that is
                away now comes back.

        Raises:
            InputError: the store cannot be reached.
        """
        self.folder, self._note = folder, note
        uri = restore_password(store_uri(experiment, folder if search is None else folder.parents[1]))
        self._uri, self._failure, self._noted = uri, "", ""
        self._begin = partial(self._shipment, experiment, fingerprint, folder, uri, search)
        shipment = None
        if search is None:
            try:
                shipment = self._begin()
            except (*FAILURES, InputError) as error:
                raise store_error(uri, error, OFFLINE) from error
            self.run_id = shipment.record.parent
        self._ending, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=[shipment], name="shipper", daemon=True)
        self._thread.start()

    def end(self, patience: float = PATIENCE_SECONDS) -> bool:
        """Let everything arrive, and with it how the run ended, which the folder says by now.

        Returns whether it did; if it takes longer than so many seconds, `note` is told what to do.
        """
        self._ending.set()
        self._thread.join(patience)
        if self._thread.is_alive():
            self._abandoned.set()
            why = f" ({self._failure})" if self._failure != self._noted else ""
            rest = command("zscl", "sync", self.folder)
            self._note(f"MLflow has not taken everything yet{why}; later, send the rest with: {rest}")
        return not self._thread.is_alive()

    @staticmethod
    def _shipment(
        experiment: Experiment, fingerprint: str, folder: Path, uri: str, search: str | None
    ) -> UploadSession:
        shipment = UploadSession(experiment, fingerprint, folder, uri, search)
        if shipment.record.status != "FINISHED":
            shipment.record.resume()
        return shipment

    def _work(self, shipment: UploadSession | None) -> None:
        pause, away = PAUSES[0], False
        while not self._abandoned.is_set():
            ending = self._ending.is_set()  # asked before the journal is read: nothing comes after the end
            fresh = shipment is None
            try:
                shipment = shipment or self._begin()
                for _ in shipment.send():
                    if self._abandoned.is_set():
                        return
                if ending:
                    shipment.finalize()
            except Exception as error:  # also whatever a store of artefacts may raise: training is worth more
                shipment = None
                log.debug("MLflow did not take records", exc_info=True)
                if not fresh:  # the run may be deleted, or its experiment: opening the store again tells
                    continue
                self._failure = self._explain(error)
                if not away:
                    kept = "" if ending else ". The run goes on, and its journal keeps them"
                    self._note(f"MLflow does not take records: {self._failure}{kept}")
                    self._noted = self._failure
                wait, pause, away = pause, min(2 * pause, PAUSES[1]), True
            else:
                if away:
                    self._note("MLflow takes records again; nothing is lost")
                self._failure = ""
                if ending:
                    return
                wait, pause, away = EVERY_SECONDS, PAUSES[0], False
            if ending:
                time.sleep(min(wait, PAUSES[0]))
            else:
                self._ending.wait(wait)

    def _explain(self, error: Exception) -> str:
        """Why MLflow does not take records, in a sentence."""
        if isinstance(error, (*FAILURES, InputError)):
            return str(store_error(self._uri, error))
        return str(error) if isinstance(error, ArtifactError) else reason_of(error, self._uri)


def sync_run(folder: Path, uri: str | None, on_sent: Callable[[int, int], None]) -> Synced:
    """Send what a store does not have yet of a run on which nobody works.

    Args:
        folder: the run's.
        uri: of the store; default: that of the run.
        on_sent: told how far it is: entries sent, and to be sent.

    Raises:
        InputError: there is no such run, it is under way, or the store or its artefact store cannot be reached.
    """
    try:
        return upload_run(folder, uri, on_sent)
    except ArtifactError as error:
        raise InputError(f"{folder}: {error}; then repeat: {command('zscl', 'sync', folder)}") from error


def upload_run(
    folder: Path, uri: str | None, on_sent: Callable[[int, int], None], search: str | None = None, files: bool = True
) -> Synced:
    """Do what `sync` does for a run, or for a trial of a search.

    Args:
        folder: See `sync`.
        uri: See `sync`.
        on_sent: See `sync`.
        search: the run, in the store, of the search that this one is a trial of.
        files: Also send what belongs into the artefact store.

    Raises:
        ArtifactError: Everything but the files is sent.
        InputError: there is no such run, it is under way, or the store cannot be reached.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise InputError(f"{folder}: found no such folder, expected a run's folder")
    with run_lock(folder, advice="copy the run to such a folder, and sync the copy"):
        fingerprint = _fingerprint(folder)
        experiment = load_experiment(folder / "experiment.yaml")
        uri = uri or restore_password(store_uri(experiment, folder))
        try:
            shipment = UploadSession(experiment, fingerprint, folder, uri, search)
            sent = 0
            for sent, total in shipment.send():
                on_sent(sent, total)
            known = shipment.record.complete and not sent
            status = "FINISHED" if known else shipment.finalize(files)
        except FAILURES as error:
            raise store_error(uri, error) from error
    return Synced(folder=str(folder), tracking_uri=mask(uri), entries=sent, status=status)


def _fingerprint(folder: Path) -> str:
    for entry in reversed(JournalReader(folder / JOURNAL).new()):
        if isinstance(entry.progress, RunStarted):
            return entry.progress.fingerprint
    raise InputError(f"{folder}: found no {JOURNAL} that tells of a run, expected the folder of a run that was started")
