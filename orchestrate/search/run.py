"""A search that was looked at (see `orchestrate.search.preflight`), run trial by trial on Ray Tune, and answered.

Trials are judged on held-out training images; only the chosen one is judged on the test images, once, at the end. The
search's folder is its own checkpoint:

    search.yaml      the search with its experiment, as it was given
    trials/          a run's folder each, by fingerprint (see `orchestrate.search.trial`)
    stages/          stages that trials have in common (see `zscl.sequence.stage_cache`)
    tune/            Ray Tune's state: which trials there are, what the sampler knows
    chosen.yaml      the chosen recipe, which `zscl run` takes as it is
    test/            the chosen trial's models, judged on the test images
    search.json      what was found; with it, the search is finished
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from orchestrate.lifecycle.lock import run_lock
from orchestrate.lifecycle.paths import CHOSEN, EXPERIMENT, FINGERPRINT, FOUND, SEARCH, SearchIdentity, search_identity
from orchestrate.lifecycle.run_status import record_outcome, write_state
from orchestrate.lifecycle.signals import StopRequest, handle_signals
from orchestrate.recipes.recipe import recipe_name, with_values, write_experiment, write_search
from orchestrate.runs.progress import ProgressBar
from orchestrate.search.preflight import PreparedSearch
from orchestrate.search.progress import SearchDisplay
from orchestrate.search.results import load_search_result, pareto_front, count_stage_trainings, trials_from_grid, utility
from schemas.algorithm import algorithm
from schemas.errors import InputError
from schemas.results import Result
from schemas.search import SearchResult, Trial, TrialNews
from zscl.runtime.atomic_io import link_folder, write_text
from zscl.sequence.layout import TRAINING
from zscl.sequence.result import describe_version, write_json

if TYPE_CHECKING:
    from ray.tune import ResultGrid

    from orchestrate.search.tracking import SearchUploader
    from orchestrate.search.trial import TrialContext

TEST = "test"
WAITING_BYTES = 10**6  # Ray wants a trial to ask for something
ONE_SEARCH = (
    "Ray Tune does not support several on one cluster: they take each other's workers, and trials may fail for want of "
    "them; expected one after the other, or a cluster each"
)
GRACE_SECONDS = 30.0  # for the trials to stop where they can go on


def run_search(prepared: PreparedSearch, folder: Path, console: Console, offline: bool = False) -> SearchResult:
    """Run a search on Ray Tune, recorded in MLflow, or go on with it; one that is finished is not run again.

    Raises:
        InputError: the cluster, the tracking store or the folder is not as expected, or all trials failed.
        InterruptedRunError: a signal ended it; it can go on.
    """
    check_same_search(prepared, folder)
    if (folder / FOUND).is_file():
        console.print(f"{folder}: finished before, nothing to do", highlight=False)
        return load_search_result(folder)
    with run_lock(folder, note=partial(console.print, highlight=False, soft_wrap=True)):
        return _search(prepared, folder, console, offline)


def check_same_search(prepared: PreparedSearch, folder: Path) -> None:
    """Refuse a folder that holds another search, or a run.

    Raises:
        InputError: it does.
    """
    file = folder / FINGERPRINT
    if file.is_file():
        found = search_identity(folder)
        if found.algorithm != algorithm():
            raise InputError(
                f"{folder}: found a search that was computed by {describe_version(found.algorithm)}, expected "
                f"{describe_version(algorithm())}, which is what this version of zscl computes: the two may give different "
                "numbers. Choose another folder"
            )
        if found.fingerprint != prepared.fingerprint:
            raise InputError(
                f"{folder}: found another search (fingerprint {found.fingerprint}), expected {prepared.fingerprint} or "
                "an empty folder; choose another folder"
            )
    if not file.is_file() and (folder / EXPERIMENT).is_file():
        raise InputError(f"{folder}: found a run, expected a search or an empty folder; choose another folder")


def _search(prepared: PreparedSearch, folder: Path, console: Console, offline: bool) -> SearchResult:
    # Ray and MLflow take seconds to import: only once there is something to run.
    from orchestrate.cluster.channel import consume_events, open_channel, running_searches
    from orchestrate.cluster.connect import connect, worker_resources
    from orchestrate.search.trial import TrialContext

    started, experiment = time.monotonic(), prepared.base.experiment
    say = partial(console.print, highlight=False, soft_wrap=True)
    connect(experiment.compute, note=say)
    if others := running_searches():
        say(f"warning: found another search on this Ray cluster ({others[0]}); {ONE_SEARCH}")
    slots = worker_resources(experiment.compute)
    queued = ", the others wait for their turn" if slots < prepared.trial_count else ""
    say(f"{prepared.trial_count} trials of {prepared.stage_count} stages; the cluster holds {slots} at once{queued}")
    identity = SearchIdentity(prepared.fingerprint, algorithm(), time.time_ns() // 1_000_000)
    if (folder / FINGERPRINT).is_file():
        identity = search_identity(folder)
    with handle_signals() as interruption:
        recording = None if offline else _recording(prepared, folder, say, identity)
        with record_outcome(folder, recording):
            write_text(folder / FINGERPRINT, f"{identity}\n")
            if not (folder / SEARCH).is_file():
                write_search(prepared.search, prepared.content, folder / SEARCH)
            write_state(folder, "RUNNING")
            line = open_channel(search=str(folder))
            common = TrialContext(prepared.search, prepared.content, prepared.file, folder, prepared.averages, line)
            steps = sum(map(experiment.stage_steps, experiment.tasks))
            with ProgressBar(console, total=prepared.trial_count * steps) as bar:
                display = SearchDisplay(prepared.search, experiment, prepared.trial_count, bar)
                with consume_events(line, partial(_hear, [display, recording] if recording else [display])):
                    fitting = partial(_fit, prepared, common, slots)
                    grid = _waited(fitting, line, interruption, lambda: not display.running)
                    trials = trials_from_grid(grid, prepared.search)
                    found = _conclude(trials, prepared, common, interruption, time.monotonic() - started)
    return found


def _recording(
    prepared: PreparedSearch, folder: Path, note: Callable[[str], None], identity: SearchIdentity
) -> "SearchUploader":
    from orchestrate.search.tracking import SearchUploader

    return SearchUploader(prepared, folder, note, identity)


def _hear(listeners: "Sequence[Callable[[TrialNews], None]]", message: str) -> None:
    news = TrialNews.model_validate_json(message)
    for listener in listeners:
        listener(news)


def _fit(prepared: PreparedSearch, common: "TrialContext", slots: int) -> "ResultGrid":
    """Run the trials that are not over yet."""
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # Tune's default forgets finished trials, when killed
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which prints to standard output, however silent it is asked to be
    from ray import tune

    from orchestrate.cluster.connect import check_resources
    from orchestrate.search.samplers import OptunaSearcher, build_scheduler
    from orchestrate.search.trial import STAGES_DONE, SearchTrial

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what a trial failed with, the search says itself

    compute = prepared.base.experiment.compute
    resources = {"CPU": compute.cpus_per_worker}
    if check_resources(compute):
        resources["GPU"] = compute.gpus_per_worker
    if compute.workers > 1:  # an actor that only waits: Ray Train asks for its workers, of all CPUs there are
        resources = {"memory": WAITING_BYTES}
    trainable = tune.with_resources(tune.with_parameters(SearchTrial, common=common), resources)
    state = common.folder / "tune"
    if tune.Tuner.can_restore(str(state)) and any(state.glob("experiment_state-*.json")):
        tuner = tune.Tuner.restore(str(state), trainable, resume_unfinished=True, resume_errored=True)
    else:
        shutil.rmtree(state, ignore_errors=True)  # killed before Tune had written anything of use
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=prepared.trial_count,
                search_alg=OptunaSearcher(prepared.search),
                scheduler=build_scheduler(prepared.search, prepared.stage_count, STAGES_DONE),
                max_concurrent_trials=slots,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=state.name,
                storage_path=str(state.parent),
                failure_config=tune.FailureConfig(max_failures=compute.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's folder is its own
                verbose=0,
            ),
        )
    return tuner.fit()


T = TypeVar("T")


def _waited(work: Callable[[], T], line: Any, interruption: StopRequest, all_stopped: Callable[[], bool]) -> T:
    """Do something in a thread, for in the main one Ray would take the signals; wait for it, or for one of these.

    Raises:
        InterruptedRunError: a signal came; what is under way was asked to stop where it can go on.
    """
    answer: Future[T] = Future()

    def settle() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=settle, name="search", daemon=True).start()
    while not interruption and not answer.done():
        wait([answer], timeout=0.1)
    if not answer.done():
        line.ask_to_stop.remote()
        deadline = time.monotonic() + GRACE_SECONDS
        while not all_stopped() and not answer.done() and time.monotonic() < deadline:
            time.sleep(0.1)
        raise interruption.error("the same command, or zscl resume, goes on; finished trials are kept")
    return answer.result()


# ---------------------------------------------------------------------------------------------------- the answer


def _conclude(
    trials: Sequence[Trial], prepared: PreparedSearch, common: "TrialContext", interruption: StopRequest, seconds: float
) -> SearchResult:
    """Choose, judge on test, and write down what was found."""
    from orchestrate.search.report import draw_trials
    from orchestrate.search.samplers import compute_importance

    search, folder = prepared.search, common.folder
    front = pareto_front(trials, search.objectives)
    if not front:
        reasons = (
            "; ".join(dict.fromkeys(trial.reason for trial in trials if trial.reason)) or "all were given up early"
        )
        raise InputError(f"{folder}: found no trial of {len(trials)} that finished ({reasons})")
    chosen = max(front, key=lambda trial: (utility(trial.objectives), -trial.number))
    recipe = with_values(search, prepared.content, chosen.values, prepared.file, judged_on=None)
    name = recipe_name(prepared.file, "-chosen")
    write_experiment(recipe.model_copy(update={"name": name}), folder / CHOSEN)
    test = _judged_on_test(chosen, prepared, common, interruption)
    result = SearchResult(
        name=recipe_name(prepared.file),
        fingerprint=prepared.fingerprint,
        objectives=search.objectives,
        held_out_share=search.validation_share,
        held_out_seed=search.seed,
        trials=tuple(trials),
        front=tuple(trial.number for trial in front),
        chosen=chosen.number,
        importance=compute_importance(search, trials),
        stage_trainings=count_stage_trainings(trials, prepared.stage_count),
        test=test,
        warnings=test.warnings,
        seconds=seconds,
    )
    if search.keep_models == "chosen":
        _forget_models(folder, keep=chosen)
    draw_trials(search, result.trials, folder)
    write_json(folder / FOUND, result)
    return result


def _judged_on_test(
    chosen: Trial, prepared: PreparedSearch, common: "TrialContext", interruption: StopRequest
) -> Result:
    """Judge the chosen trial's models on the test images: nothing is trained."""
    from orchestrate.search.trial import evaluate_on_test

    experiment = with_values(prepared.search, prepared.content, chosen.values, prepared.file, judged_on="test")
    place = common.folder / TEST
    for stage in (common.folder / chosen.folder / "stages").iterdir():
        if not (place / "stages" / stage.name / TRAINING).is_file() and not stage.name.startswith("."):
            link_folder(stage, place / "stages" / stage.name, without=("accuracy*",))
    write_experiment(experiment, place / EXPERIMENT)
    judging = partial(evaluate_on_test, experiment, place, common)
    result = _waited(judging, common.channel, interruption, lambda: True)
    write_state(place, "FINISHED")
    return result


def _forget_models(folder: Path, keep: Trial) -> None:
    """Remove the weights of all trials but one; their results stay."""
    shutil.rmtree(folder / "stages", ignore_errors=True)
    for model in folder.glob("trials/*/stages/*/model"):
        if model.parents[2] != folder / keep.folder:
            shutil.rmtree(model, ignore_errors=True)
