"""Hyperparameter search: runs trials on Ray Tune, chooses the best one, and evaluates it on the test images.

Trials are evaluated on held-out training images. Only the chosen trial is evaluated on the test images, once, at the
end. A search resumes from the files in its folder:

    search.yaml      the recipe of the search, including its experiment
    trials/          one run folder per trial, named by fingerprint (see `orchestrate.search.trial`)
    stages/          trained stages that trials share (see `zscl.sequence.stage_cache`)
    tune/            Ray Tune's state: its trials, and the state of the sampler
    chosen.yaml      the chosen recipe, ready for `zscl run`
    test/            run folder of the chosen trial's models, evaluated on the test images
    search.json      the result; the search is finished if this file exists
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
from orchestrate.lifecycle.paths import (
    CHOSEN_RECIPE,
    FINGERPRINT,
    SEARCH,
    SEARCH_RESULT,
    SearchIdentity,
    read_search_identity,
)
from orchestrate.lifecycle.run_status import record_outcome, write_state
from orchestrate.lifecycle.signals import StopRequest, handle_signals
from orchestrate.recipes.recipe import build_trial_experiment, recipe_name, write_experiment, write_search
from orchestrate.runs.progress import ProgressBar
from orchestrate.search.preflight import PreparedSearch
from orchestrate.search.progress import SearchDisplay
from orchestrate.search.results import (
    build_trials,
    compute_utility,
    count_stage_trainings,
    load_search_result,
    select_pareto_front,
)
from schemas.algorithm import algorithm_version
from schemas.errors import ErrorCode, InputError
from schemas.results import Result
from schemas.search import SearchResult, Trial, TrialEvent
from zscl.runtime.atomic_io import link_folder, write_text
from zscl.sequence.layout import (
    ACCURACY,
    EXPERIMENT,
    MODEL_FOLDER,
    STAGES_FOLDER,
    TRAINING,
    partial_row_file,
    stage_cache_folder,
    stages_folder,
)
from zscl.sequence.result import describe_algorithm, write_json

if TYPE_CHECKING:
    from ray.tune import ResultGrid

    from orchestrate.search.tracking import SearchUploader
    from orchestrate.search.trial import TrialContext

TEST_FOLDER = "test"
IDLE_ACTOR_BYTES = 10**6  # Ray Tune requires that a trial requests some resource
ONE_SEARCH = (
    "Ray Tune does not support several searches on one cluster: they compete for workers, and trials may fail because "
    "no worker is free. Run one search at a time, or use a separate cluster for each"
)
GRACE_SECONDS = 30.0  # for running trials to write a checkpoint and stop
T = TypeVar("T")


def run_search(prepared: PreparedSearch, folder: Path, console: Console, offline: bool = False) -> SearchResult:
    """Run or resume a search on Ray Tune. If the search is finished, only load its result.

    Args:
        prepared: The checked search.
        folder: The search's folder.
        console: Console for progress and messages.
        offline: Whether to run without MLflow.

    Returns:
        The search's result.

    Raises:
        InputError: The cluster or the tracking store cannot be used, another process uses the folder, the folder holds
            other results, or no trial finished.
        InterruptedRunError: A signal stopped the search. The search can be resumed.
    """
    check_same_search(prepared, folder)
    if (folder / SEARCH_RESULT).is_file():
        console.print(f"{folder}: finished before, nothing to do", highlight=False)
        return load_search_result(folder)
    with run_lock(folder, note=partial(console.print, highlight=False, soft_wrap=True)):
        return _search(prepared, folder, console, offline)


def check_same_search(prepared: PreparedSearch, folder: Path) -> None:
    """Check that a search can run in a folder: that the folder holds this search, or neither a search nor a run.

    Args:
        prepared: The checked search.
        folder: The search's folder.

    Raises:
        InputError: The folder holds another search, a run, or results of another version of the algorithm.
    """
    if (folder / FINGERPRINT).is_file():
        identity = read_search_identity(folder)
        if identity.algorithm != algorithm_version():
            raise InputError(
                f"{folder}: found a search that was computed by {describe_algorithm(identity.algorithm)}, expected "
                f"{describe_algorithm(algorithm_version())}, which this version of zscl uses. The two may give "
                "different numbers. Choose another folder",
                code=ErrorCode.OTHER_ALGORITHM,
            )
        if identity.fingerprint != prepared.fingerprint:
            raise InputError(
                f"{folder}: found another search (fingerprint {identity.fingerprint}), expected {prepared.fingerprint} "
                "or an empty folder; choose another folder",
                code=ErrorCode.OTHER_RUN,
            )
    elif (folder / EXPERIMENT).is_file():
        raise InputError(
            f"{folder}: found a run, expected a search or an empty folder; choose another folder",
            code=ErrorCode.OTHER_RUN,
        )


def _search(prepared: PreparedSearch, folder: Path, console: Console, offline: bool) -> SearchResult:
    # Ray and MLflow take seconds to import, so they are imported only for a search that has to run.
    from orchestrate.cluster.channel import consume_events, create_channel, list_running_searches
    from orchestrate.cluster.connect import connect, count_concurrent_runs
    from orchestrate.search.trial import TrialContext

    started, experiment = time.monotonic(), prepared.base.experiment
    note = partial(console.print, highlight=False, soft_wrap=True)
    connect(experiment.compute, note=note)
    if searches := list_running_searches():
        note(f"warning: found another search on this Ray cluster ({searches[0]}); {ONE_SEARCH}")
    slots = count_concurrent_runs(experiment.compute)
    queued = ", the others wait for their turn" if slots < prepared.trial_count else ""
    note(f"{prepared.trial_count} trials of {prepared.stage_count} stages; the cluster holds {slots} at once{queued}")
    identity = SearchIdentity(prepared.fingerprint, algorithm_version(), time.time_ns() // 1_000_000)
    if (folder / FINGERPRINT).is_file():
        identity = read_search_identity(folder)
    with handle_signals() as stop_request:
        uploader = None if offline else _open_uploader(prepared, folder, note, identity)
        with record_outcome(folder, uploader):
            write_text(folder / FINGERPRINT, f"{identity}\n")
            if not (folder / SEARCH).is_file():
                write_search(prepared.search, prepared.content, folder / SEARCH)
            write_state(folder, "RUNNING")
            channel = create_channel(search=str(folder))
            context = TrialContext(prepared.search, prepared.content, prepared.file, folder, prepared.averages, channel)
            steps = sum(map(experiment.stage_steps, experiment.tasks))
            with ProgressBar(console, total=prepared.trial_count * steps) as bar:
                display = SearchDisplay(prepared.search, experiment, prepared.trial_count, bar)
                listeners: list[Callable[[TrialEvent], None]] = [display, uploader] if uploader else [display]
                with consume_events(channel, partial(_dispatch, listeners)):
                    run_trials = partial(_run_trials, prepared, context, slots)
                    grid = _wait_for(run_trials, channel, stop_request, lambda: not display.running)
                    trials = build_trials(grid, prepared.search)
                    return _conclude(trials, prepared, context, stop_request, started)


def _open_uploader(
    prepared: PreparedSearch, folder: Path, note: Callable[[str], None], identity: SearchIdentity
) -> "SearchUploader":
    from orchestrate.search.tracking import SearchUploader

    return SearchUploader(prepared, folder, note, identity)


def _dispatch(listeners: Sequence[Callable[[TrialEvent], None]], message: str) -> None:
    event = TrialEvent.model_validate_json(message)
    for listener in listeners:
        listener(event)


def _run_trials(prepared: PreparedSearch, context: "TrialContext", slots: int) -> "ResultGrid":
    """Run the trials that have not finished, and return the results of all trials."""
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # by default, a killed Tune may forget finished trials
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints to standard output even with verbose=0
    from ray import tune

    from orchestrate.cluster.connect import check_resources
    from orchestrate.search.samplers import OptunaSearcher, build_scheduler
    from orchestrate.search.trial import STAGES_DONE, SearchTrial

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the search itself reports failed trials

    compute = prepared.base.experiment.compute
    resources = {"CPU": compute.cpus_per_worker}
    if check_resources(compute):
        resources["GPU"] = compute.gpus_per_worker
    if compute.workers > 1:  # the actor only waits; Ray Train requests the CPUs and GPUs of its workers
        resources = {"memory": IDLE_ACTOR_BYTES}
    trainable = tune.with_resources(tune.with_parameters(SearchTrial, context=context), resources)
    state = context.folder / "tune"
    if tune.Tuner.can_restore(str(state)) and any(state.glob("experiment_state-*.json")):
        tuner = tune.Tuner.restore(str(state), trainable, resume_unfinished=True, resume_errored=True)
    else:
        shutil.rmtree(state, ignore_errors=True)  # the process was killed before Tune wrote a usable state
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
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the trial's folder is a checkpoint
                verbose=0,
            ),
        )
    return tuner.fit()


def _wait_for(work: Callable[[], T], channel: Any, stop_request: StopRequest, all_stopped: Callable[[], bool]) -> T:
    """Call a function in another thread, and wait until the function returns or a signal arrives.

    In the main thread, Ray would handle the signals itself.

    Args:
        work: The function.
        channel: Handle of the `RunChannel` actor, through which the trials are requested to stop.
        stop_request: The request that a signal sets.
        all_stopped: Function that returns whether all trials have stopped.

    Returns:
        The function's result.

    Raises:
        InterruptedRunError: A signal arrived. The error is raised when all trials have stopped, at the latest after
            `GRACE_SECONDS`.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="search", daemon=True).start()
    while not stop_request and not answer.done():
        wait([answer], timeout=0.1)
    if not answer.done():
        channel.request_stop.remote()
        deadline = time.monotonic() + GRACE_SECONDS
        while not all_stopped() and not answer.done() and time.monotonic() < deadline:
            time.sleep(0.1)
        raise stop_request.to_error("the same command, or zscl resume, resumes it; finished trials are kept")
    return answer.result()


def _conclude(
    trials: Sequence[Trial],
    prepared: PreparedSearch,
    context: "TrialContext",
    stop_request: StopRequest,
    started: float,
) -> SearchResult:
    """Choose a trial, evaluate it on the test images, and write the search's result.

    Args:
        trials: All trials.
        prepared: The checked search.
        context: The context that all trials share.
        stop_request: The request that a signal sets.
        started: Value of `time.monotonic()` at the start of the search.

    Returns:
        The search's result.

    Raises:
        InputError: No trial finished.
    """
    from orchestrate.search.report import draw_trials
    from orchestrate.search.samplers import compute_importance

    search, folder = prepared.search, context.folder
    front = select_pareto_front(trials, search.objectives)
    if not front:
        reasons = "; ".join(dict.fromkeys(trial.reason for trial in trials if trial.reason))
        raise InputError(
            f"{folder}: none of the {len(trials)} trials finished ({reasons or 'all were stopped early'})",
            code=ErrorCode.FAILED,
        )
    chosen = max(front, key=lambda trial: (compute_utility(trial.objectives), -trial.number))
    recipe = build_trial_experiment(search, prepared.content, chosen.values, prepared.file, judged_on=None)
    name = recipe_name(prepared.file, "-chosen")
    write_experiment(recipe.model_copy(update={"name": name}), folder / CHOSEN_RECIPE)
    seconds = time.monotonic() - started
    test = _evaluate_on_test(chosen, prepared, context, stop_request)
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
        _delete_other_models(folder, chosen)
    draw_trials(search, result.trials, folder)
    write_json(folder / SEARCH_RESULT, result)
    return result


def _evaluate_on_test(
    chosen: Trial, prepared: PreparedSearch, context: "TrialContext", stop_request: StopRequest
) -> Result:
    """Evaluate the models of the chosen trial on the test images, without training."""
    from orchestrate.search.trial import evaluate_on_test

    experiment = build_trial_experiment(
        prepared.search, prepared.content, chosen.values, prepared.file, judged_on="test"
    )
    run = context.folder / TEST_FOLDER
    for stage in stages_folder(context.folder / chosen.folder).iterdir():
        linked = stages_folder(run) / stage.name
        if not (linked / TRAINING).is_file() and not stage.name.startswith("."):
            link_folder(stage, linked, exclude=(ACCURACY, partial_row_file(Path(ACCURACY)).name))
    write_experiment(experiment, run / EXPERIMENT)
    work = partial(evaluate_on_test, experiment, run, context)
    result = _wait_for(work, context.channel, stop_request, lambda: True)
    write_state(run, "FINISHED")
    return result


def _delete_other_models(folder: Path, chosen: Trial) -> None:
    """Delete the weights of all trials except the chosen one. Results are not deleted."""
    shutil.rmtree(stage_cache_folder(folder), ignore_errors=True)
    for model in folder.glob(f"trials/*/{STAGES_FOLDER}/*/{MODEL_FOLDER}"):
        if model.parents[2] != folder / chosen.folder:
            shutil.rmtree(model, ignore_errors=True)
