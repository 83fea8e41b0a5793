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

from orchestrate.lifecycle.lock import owned
from orchestrate.lifecycle.paths import CHOSEN, EXPERIMENT, FINGERPRINT, FOUND, SEARCH, SearchIdentity, search_identity
from orchestrate.lifecycle.run_status import outcome_told, write_state
from orchestrate.lifecycle.signals import Interruption, signals_taken
from orchestrate.recipes.recipe import at, name_of, write_experiment, write_search
from orchestrate.runs.progress import Bar
from orchestrate.search.preflight import Prepared
from orchestrate.search.progress import SearchDisplay
from orchestrate.search.results import front_of, goodness_of, load_found, stage_trainings, trials_of
from schemas.algorithm import algorithm
from schemas.errors import InputError
from schemas.results import Result
from schemas.search import SearchResult, Trial, TrialNews
from zscl.runtime.atomic_io import link_folder, write_text
from zscl.sequence.layout import TRAINING
from zscl.sequence.result import named, write_whole

if TYPE_CHECKING:
    from ray.tune import ResultGrid

    from orchestrate.search.tracking import SearchRecording
    from orchestrate.search.trial import Common

TEST = "test"
WAITING_BYTES = 10**6  # Ray wants a trial to ask for something
ONE_SEARCH = (
    "Ray Tune does not support several on one cluster: they take each other's workers, and trials may fail for want of "
    "them; expected one after the other, or a cluster each"
)
GRACE_SECONDS = 30.0  # for the trials to stop where they can go on


def search(prepared: Prepared, folder: Path, console: Console, offline: bool = False) -> SearchResult:
    """Run a search on Ray Tune, recorded in MLflow, or go on with it; one that is finished is not run again.

    Raises:
        InputError: the cluster, the tracking store or the folder is not as expected, or all trials failed.
        InterruptedRunError: a signal ended it; it can go on.
    """
    refuse_other_search(prepared, folder)
    if (folder / FOUND).is_file():
        console.print(f"{folder}: finished before, nothing to do", highlight=False)
        return load_found(folder)
    with owned(folder, note=partial(console.print, highlight=False, soft_wrap=True)):
        return _search(prepared, folder, console, offline)


def refuse_other_search(prepared: Prepared, folder: Path) -> None:
    """Refuse a folder that holds another search, or a run.

    Raises:
        InputError: it does.
    """
    file = folder / FINGERPRINT
    if file.is_file():
        found = search_identity(folder)
        if found.algorithm != algorithm():
            raise InputError(
                f"{folder}: found a search that was computed by {named(found.algorithm)}, expected "
                f"{named(algorithm())}, which is what this version of zscl computes: the two may give different "
                "numbers. Choose another folder"
            )
        if found.fingerprint != prepared.fingerprint:
            raise InputError(
                f"{folder}: found another search (fingerprint {found.fingerprint}), expected {prepared.fingerprint} or "
                "an empty folder; choose another folder"
            )
    if not file.is_file() and (folder / EXPERIMENT).is_file():
        raise InputError(f"{folder}: found a run, expected a search or an empty folder; choose another folder")


def _search(prepared: Prepared, folder: Path, console: Console, offline: bool) -> SearchResult:
    # Ray and MLflow take seconds to import: only once there is something to run.
    from orchestrate.cluster.channel import line_from_here, listening, searches_on_cluster
    from orchestrate.cluster.connect import connect, slots_of
    from orchestrate.search.trial import Common

    started, experiment = time.monotonic(), prepared.base.experiment
    say = partial(console.print, highlight=False, soft_wrap=True)
    connect(experiment.compute, note=say)
    if others := searches_on_cluster():
        say(f"warning: found another search on this Ray cluster ({others[0]}); {ONE_SEARCH}")
    slots = slots_of(experiment.compute)
    queued = ", the others wait for their turn" if slots < prepared.trials else ""
    say(f"{prepared.trials} trials of {prepared.stages} stages; the cluster holds {slots} at once{queued}")
    identity = SearchIdentity(prepared.fingerprint, algorithm(), time.time_ns() // 1_000_000)
    if (folder / FINGERPRINT).is_file():
        identity = search_identity(folder)
    with signals_taken() as interruption:
        recording = None if offline else _recording(prepared, folder, say, identity)
        with outcome_told(folder, recording):
            write_text(folder / FINGERPRINT, f"{identity}\n")
            if not (folder / SEARCH).is_file():
                write_search(prepared.search, prepared.content, folder / SEARCH)
            write_state(folder, "RUNNING")
            line = line_from_here(search=str(folder))
            common = Common(prepared.search, prepared.content, prepared.file, folder, prepared.averages, line)
            steps = sum(map(experiment.stage_steps, experiment.tasks))
            with Bar(console, total=prepared.trials * steps) as bar:
                display = SearchDisplay(prepared.search, experiment, prepared.trials, bar)
                with listening(line, partial(_hear, [display, recording] if recording else [display])):
                    fitting = partial(_fit, prepared, common, slots)
                    grid = _waited(fitting, line, interruption, lambda: not display.running)
                    trials = trials_of(grid, prepared.search)
                    found = _conclude(trials, prepared, common, interruption, time.monotonic() - started)
    return found


def _recording(
    prepared: Prepared, folder: Path, note: Callable[[str], None], identity: SearchIdentity
) -> "SearchRecording":
    from orchestrate.search.tracking import SearchRecording

    return SearchRecording(prepared, folder, note, identity)


def _hear(listeners: "Sequence[Callable[[TrialNews], None]]", message: str) -> None:
    news = TrialNews.model_validate_json(message)
    for listener in listeners:
        listener(news)


def _fit(prepared: Prepared, common: "Common", slots: int) -> "ResultGrid":
    """Run the trials that are not over yet."""
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # Tune's default forgets finished trials, when killed
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which prints to standard output, however silent it is asked to be
    from ray import tune

    from orchestrate.cluster.connect import check_resources
    from orchestrate.search.samplers import Sampling, scheduler
    from orchestrate.search.trial import STAGES, SearchTrial

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
                num_samples=prepared.trials,
                search_alg=Sampling(prepared.search),
                scheduler=scheduler(prepared.search, prepared.stages, STAGES),
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


def _waited(work: Callable[[], T], line: Any, interruption: Interruption, all_stopped: Callable[[], bool]) -> T:
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
    trials: Sequence[Trial], prepared: Prepared, common: "Common", interruption: Interruption, seconds: float
) -> SearchResult:
    """Choose, judge on test, and write down what was found."""
    from orchestrate.search.report import draw
    from orchestrate.search.samplers import importance

    search, folder = prepared.search, common.folder
    front = front_of(trials, search.objectives)
    if not front:
        reasons = (
            "; ".join(dict.fromkeys(trial.reason for trial in trials if trial.reason)) or "all were given up early"
        )
        raise InputError(f"{folder}: found no trial of {len(trials)} that finished ({reasons})")
    chosen = max(front, key=lambda trial: (goodness_of(trial.objectives), -trial.number))
    recipe = at(search, prepared.content, chosen.values, prepared.file, judged_on=None)
    name = name_of(prepared.file, "-chosen")
    write_experiment(recipe.model_copy(update={"name": name}), folder / CHOSEN)
    test = _judged_on_test(chosen, prepared, common, interruption)
    result = SearchResult(
        name=name_of(prepared.file),
        fingerprint=prepared.fingerprint,
        objectives=search.objectives,
        held_out_share=search.validation_share,
        held_out_seed=search.seed,
        trials=tuple(trials),
        front=tuple(trial.number for trial in front),
        chosen=chosen.number,
        importance=importance(search, trials),
        stage_trainings=stage_trainings(trials, prepared.stages),
        test=test,
        warnings=test.warnings,
        seconds=seconds,
    )
    if search.keep_models == "chosen":
        _forget_models(folder, keep=chosen)
    draw(search, result.trials, folder)
    write_whole(folder / FOUND, result)
    return result


def _judged_on_test(chosen: Trial, prepared: Prepared, common: "Common", interruption: Interruption) -> Result:
    """Judge the chosen trial's models on the test images: nothing is trained."""
    from orchestrate.search.trial import judged_on_test

    experiment = at(prepared.search, prepared.content, chosen.values, prepared.file, judged_on="test")
    place = common.folder / TEST
    for stage in (common.folder / chosen.folder / "stages").iterdir():
        if not (place / "stages" / stage.name / TRAINING).is_file() and not stage.name.startswith("."):
            link_folder(stage, place / "stages" / stage.name, without=("accuracy*",))
    write_experiment(experiment, place / EXPERIMENT)
    judging = partial(judged_on_test, experiment, place, common)
    result = _waited(judging, common.line, interruption, lambda: True)
    write_state(place, "FINISHED")
    return result


def _forget_models(folder: Path, keep: Trial) -> None:
    """Remove the weights of all trials but one; their results stay."""
    shutil.rmtree(folder / "stages", ignore_errors=True)
    for model in folder.glob("trials/*/stages/*/model"):
        if model.parents[2] != folder / keep.folder:
            shutil.rmtree(model, ignore_errors=True)
