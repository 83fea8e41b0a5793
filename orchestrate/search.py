"""A search from a recipe: checked, sampled, run trial by trial on Ray Tune, and answered.

Trials are judged on held-out training images; only the chosen one is judged on the test images, once, at the end. The
search's folder is its own checkpoint:

    search.yaml      the search with its experiment, as it was given
    trials/          a run's folder each, by fingerprint (see `orchestrate.trial`)
    stages/          stages that trials have in common (see `zscl.stages`)
    tune/            Ray Tune's state: which trials there are, what the sampler knows
    chosen.yaml      the chosen recipe, which `zscl run` takes as it is
    test/            the chosen trial's models, judged on the test images
    search.json      what was found; with it, the search is finished
"""

import itertools
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from orchestrate import places, preflight, recipes, run
from orchestrate.display import Bar, SearchDisplay
from orchestrate.interruption import Interruption, signals_taken
from orchestrate.ownership import owned
from orchestrate.state import write_state
from schemas.base import InputError, InterruptedRunError
from schemas.results import Result
from schemas.search import (
    TASK_ACCURACY,
    Search,
    SearchResult,
    StageTrainings,
    Trial,
    TrialNews,
    direction_of,
)
from schemas.secrets import MASK, mask
from zscl.files import link_folder, write_text
from zscl.opened import Opened
from zscl.rows import write_whole
from zscl.stages import TRAINING, Averages

if TYPE_CHECKING:
    from ray.tune import ResultGrid

    from orchestrate.search_tracking import SearchRecording
    from orchestrate.trial import Common

MOST_AVERAGES = 8  # models beside the student while the first stage is trained
UNDEFINED = ("transfer", "forgetting", "backward_transfer", "forward_transfer")  # of a single task
DATA = ("model", "tasks", "reference", "class_incremental")  # domains whose values name other data
TEST = "test"
WAITING_BYTES = 10**6  # Ray wants a trial to ask for something
GRACE_SECONDS = 30.0  # for the trials to stop where they can go on


@dataclass(frozen=True)
class Prepared:
    """A search that was looked at.

    base: its experiment as the recipe has it, judged on what is held out; content: of that experiment, unchecked;
    averages: of all trials, where the first stage can be trained once for all that differ in it alone.
    """

    search: Search
    content: Mapping[str, Any]
    file: Path
    base: Opened
    fingerprint: str
    averages: Averages

    @property
    def stages(self) -> int:
        """Of a trial."""
        return len(self.base.tasks)

    @property
    def trials(self) -> int:
        """How many there will be."""
        if self.search.trials is not None:
            return self.search.trials
        return math.prod(len(domain.values or ()) for domain in self.search.domains.values())


# -------------------------------------------------------------------------------------------------- beforehand


def prepare(file: Path, overrides: Sequence[str] = ()) -> Prepared:
    """Check a search before anything is started: its experiment, each domain's ends, its data, its objectives.

    Raises:
        InputError: something is refused, missing or wrong.
    """
    search, content = recipes.load_search(file, overrides)
    experiment = recipes.at(search, content, {}, file)
    points = [{path: end} for path, domain in search.domains.items() for end in domain.ends]
    if search.sampler == "grid":
        values = [[(path, value) for value in domain.values or ()] for path, domain in search.domains.items()]
        points = [dict(each) for each in itertools.product(*values)]
    refusals: list[str] = []
    for point in points:
        try:
            at_point = recipes.at(search, content, point, file)
            if any(path.split(".")[0] in DATA for path in point):
                preflight.prepare(at_point)
        except InputError as error:
            refusals.append(str(error))
    if refusals:
        raise InputError("\n".join(dict.fromkeys(refusals)))
    if experiment.compute.storage is not None:
        raise InputError(
            f"{file}: found compute.storage, expected a folder that all nodes see: trials share what they have trained"
        )
    if experiment.compute.evaluation == "overlapped":
        raise InputError(
            f"{file}: compute.evaluation is overlapped, expected inline: a trial's stage is judged before its next one"
        )
    base = preflight.prepare(experiment)
    _check_objectives(search, base, file)
    return Prepared(search, content, file, base, search.fingerprint(base.fingerprint), _averages(search, content, file))


def _check_objectives(search: Search, base: Opened, file: Path) -> None:
    names = [task.name for task in base.tasks]
    for objective in search.objectives:
        task = objective.removeprefix(TASK_ACCURACY)
        if objective.startswith(TASK_ACCURACY) and task not in names:
            raise InputError(
                f"{file}: search.objectives: found {objective}, expected {TASK_ACCURACY} and one of {', '.join(names)}"
            )
        if len(names) == 1 and objective in UNDEFINED:
            raise InputError(f"{file}: search.objectives: found {objective}, which a single task leaves undefined")


def _averages(search: Search, content: Mapping[str, Any], file: Path) -> Averages:
    """The trials' averages, if they are few and trials can meet that differ in nothing else."""
    values = [domain.values for domain in search.domains.values()]
    if any(each is None for each in values) or not any(path.split(".")[0] == "method" for path in search.domains):
        return ()
    relevant = {path: domain.values or () for path, domain in search.domains.items() if path.split(".")[0] == "method"}
    found: dict[Any, None] = {}
    for point in itertools.islice(itertools.product(*relevant.values()), 1_000):
        try:
            found[recipes.at(search, content, dict(zip(relevant, point, strict=True)), file).method.average] = None
        except InputError:  # the trial will say so
            continue
    return tuple(found) if 1 < len(found) <= MOST_AVERAGES else ()


def folder_of(prepared: Prepared, out: Path | None) -> Path:
    """Where a search's folder is."""
    if out is not None:
        return out.absolute()
    return Path.cwd() / "runs" / f"{prepared.file.stem}-{prepared.fingerprint[:8]}"


def plan(prepared: Prepared, folder: Path) -> dict[str, object]:
    """What a search will do, in numbers."""
    experiment, trials = prepared.base.experiment, prepared.trials
    steps = sum(map(experiment.stage_steps, experiment.tasks))
    held_out = {task.name: len(task.test) for task in prepared.base.tasks}  # type: ignore[arg-type]  # local, then
    return {
        "fingerprint": prepared.fingerprint,
        "folder": str(folder),
        "trials": trials,
        "workers_a_trial": experiment.compute.workers,
        "stage_trainings": trials * prepared.stages,
        "steps_a_trial": steps,
        "images_through_student": trials * preflight.images_through_student(experiment),
        "held_out_images": held_out,
        "first_stage_shared_by_averages": len(prepared.averages),
        "megabytes_of_models": round(trials * prepared.stages * preflight.model_megabytes(prepared.base)),
    }


# ------------------------------------------------------------------------------------------------------ search


def search(prepared: Prepared, folder: Path, console: Console, offline: bool = False) -> SearchResult:
    """Run a search on Ray Tune, recorded in MLflow, or go on with it; one that is finished is not run again.

    Raises:
        InputError: the cluster, the tracking store or the folder is not as expected, or all trials failed.
        InterruptedRunError: a signal ended it; it can go on.
    """
    _refuse_other_search(prepared, folder)
    if (folder / places.FOUND).is_file():
        console.print(f"{folder}: finished before, nothing to do", highlight=False)
        return load_found(folder)
    with owned(folder, note=partial(console.print, highlight=False, soft_wrap=True)):
        return _search(prepared, folder, console, offline)


def resumable(folder: Path, overrides: Sequence[str]) -> Prepared:
    """Read the search that a folder holds.

    Raises:
        InputError: an override would make it another one, or something is missing.
    """
    for override in overrides:
        if not override.startswith(("compute.", "tracking.")):
            raise InputError(f"--set {override}: expected a field of compute or tracking; all else is what is searched")
    prepared = prepare(folder / places.SEARCH, overrides)
    if MASK in prepared.base.experiment.model_dump_json(exclude={"tracking"}):
        raise InputError(
            f"{folder / places.SEARCH}: found {MASK} where the recipe has secrets, expected the recipe: zscl search "
            f"RECIPE --out {folder}"
        )
    return prepared


def load_found(folder: Path) -> SearchResult:
    """What a finished search found."""
    return SearchResult.model_validate_json((folder / places.FOUND).read_text(encoding="utf-8"))


def _refuse_other_search(prepared: Prepared, folder: Path) -> None:
    file = folder / places.FINGERPRINT
    found = file.read_text().strip() if file.is_file() else prepared.fingerprint
    if found != prepared.fingerprint:
        raise InputError(
            f"{folder}: found another search (fingerprint {found}), expected {prepared.fingerprint} or an empty "
            "folder; choose another folder"
        )
    if not file.is_file() and (folder / places.EXPERIMENT).is_file():
        raise InputError(f"{folder}: found a run, expected a search or an empty folder; choose another folder")


def _search(prepared: Prepared, folder: Path, console: Console, offline: bool) -> SearchResult:
    # Ray and MLflow take seconds to import: only once there is something to run.
    from orchestrate.cluster import connect, slots_of
    from orchestrate.line import line_from_here, listening
    from orchestrate.trial import Common

    started, experiment = time.monotonic(), prepared.base.experiment
    say = partial(console.print, highlight=False, soft_wrap=True)
    connect(experiment.compute, note=say)
    slots = slots_of(experiment.compute)
    queued = ", the others wait for their turn" if slots < prepared.trials else ""
    say(f"{prepared.trials} trials of {prepared.stages} stages; the cluster holds {slots} at once{queued}")
    with signals_taken() as interruption:
        recording = None if offline else _recording(prepared, folder, say)
        killed = False
        try:
            write_text(folder / places.FINGERPRINT, prepared.fingerprint + "\n")
            if not (folder / places.SEARCH).is_file():
                recipes.write_search(prepared.search, prepared.content, folder / places.SEARCH)
            write_state(folder, "RUNNING")
            line = line_from_here()
            common = Common(prepared.search, prepared.content, prepared.file, folder, prepared.averages, line)
            steps = sum(map(experiment.stage_steps, experiment.tasks))
            with Bar(console, total=prepared.trials * steps) as bar:
                display = SearchDisplay(prepared.search, experiment, prepared.trials, bar)
                with listening(line, partial(_hear, [display, recording] if recording else [display])):
                    fitting = partial(_fit, prepared, common, slots)
                    grid = _waited(fitting, line, interruption, lambda: not display.running)
                    found = _conclude(
                        _trials(grid, prepared), prepared, common, interruption, time.monotonic() - started
                    )
            write_state(folder, "FINISHED")
        except BaseException as error:
            killed = isinstance(error, InterruptedRunError | KeyboardInterrupt | SystemExit)
            told = isinstance(error, InterruptedRunError | InputError)
            reason = str(error) if told else f"{type(error).__name__}: {error}"
            write_state(folder, "KILLED" if killed else "FAILED", mask(reason))
            raise
        finally:
            if recording:
                recording.end(run.HASTE_SECONDS) if killed else recording.end()
    return found


def _recording(prepared: Prepared, folder: Path, note: Callable[[str], None]) -> "SearchRecording":
    from orchestrate.search_tracking import SearchRecording

    return SearchRecording(prepared, folder, note)


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

    from orchestrate import sampling
    from orchestrate.cluster import check_resources
    from orchestrate.trial import STAGES, SearchTrial

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
                search_alg=sampling.Sampling(prepared.search),
                scheduler=sampling.scheduler(prepared.search, prepared.stages, STAGES),
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


def _trials(grid: "ResultGrid", prepared: Prepared) -> list[Trial]:
    """What became of the trials, in the order of suggestion."""
    from orchestrate.sampling import NUMBER
    from orchestrate.trial import STAGES

    found = []
    for result in grid:
        reported, domains = result.metrics or {}, prepared.search.domains
        given = result.config or {}
        status, reason = str(reported.get("status", "running")), str(reported.get("reason", ""))
        stages = int(reported.get(STAGES, 0))
        if result.error is not None:
            status, reason = "failed", _last_line(result.error)
        elif status == "running":
            status = "stopped"
        objectives = {name: float(reported[name]) for name in prepared.search.objectives if name in reported}
        found.append(
            Trial(
                number=given[NUMBER],
                values={path: domain.meant(given[path]) for path, domain in domains.items()},
                status=status,  # type: ignore[arg-type]  # checked by pydantic
                reason=reason,
                fingerprint=str(reported.get("fingerprint", "")),
                folder=f"trials/{reported.get('fingerprint', '')}",
                stages=stages,
                shared_stages=int(reported.get("shared_stages", 0)),
                objectives={} if any(map(math.isnan, objectives.values())) else objectives,
                train_seconds=float(reported.get("train_seconds", 0.0)),
            )
        )
    return sorted(found, key=lambda trial: trial.number)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:500]


def front_of(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The finished trials that no other one beats: better in one objective, and worse in none."""
    done = [trial for trial in trials if trial.status in ("finished", "read") and trial.objectives]
    goodness = {trial.number: tuple(goodness_of(trial, [name]) for name in objectives) for trial in done}

    def beaten(trial: Trial) -> bool:
        mine = goodness[trial.number]
        return any(
            other != mine and all(theirs >= ours for theirs, ours in zip(other, mine, strict=True))
            for other in goodness.values()
        )

    return [trial for trial in done if not beaten(trial)]


def goodness_of(trial: Trial, objectives: Sequence[str]) -> float:
    """The mean of a trial's objectives, each the larger the better; all are differences or means of accuracies."""
    return fmean(trial.objectives[name] * (1 if direction_of(name) == "max" else -1) for name in objectives)


def _conclude(
    trials: Sequence[Trial], prepared: Prepared, common: "Common", interruption: Interruption, seconds: float
) -> SearchResult:
    """Choose, judge on test, and write down what was found."""
    search, folder = prepared.search, common.folder
    front = front_of(trials, search.objectives)
    if not front:
        reasons = (
            "; ".join(dict.fromkeys(trial.reason for trial in trials if trial.reason)) or "all were given up early"
        )
        raise InputError(f"{folder}: found no trial of {len(trials)} that finished ({reasons})")
    chosen = max(front, key=lambda trial: (goodness_of(trial, search.objectives), -trial.number))
    recipe = recipes.at(search, prepared.content, chosen.values, prepared.file, judged_on=None)
    recipes.write_experiment(recipe.model_copy(update={"name": f"{prepared.file.stem}-chosen"}), folder / places.CHOSEN)
    test = _judged_on_test(chosen, prepared, common, interruption)
    result = SearchResult(
        name=prepared.file.stem,
        fingerprint=prepared.fingerprint,
        objectives=search.objectives,
        held_out_share=search.validation_share,
        held_out_seed=search.seed,
        trials=tuple(trials),
        front=tuple(trial.number for trial in front),
        chosen=chosen.number,
        importance=_importance(search, trials),
        stage_trainings=_stage_trainings(trials, prepared.stages),
        test=test,
        warnings=test.warnings,
        seconds=seconds,
    )
    if search.keep_models == "chosen":
        _forget_models(folder, keep=chosen)
    from orchestrate.search_report import draw

    draw(search, result.trials, folder)
    write_whole(folder / places.FOUND, result)
    return result


def _judged_on_test(chosen: Trial, prepared: Prepared, common: "Common", interruption: Interruption) -> Result:
    """Judge the chosen trial's models on the test images: nothing is trained."""
    from orchestrate.trial import judged_on_test

    experiment = recipes.at(prepared.search, prepared.content, chosen.values, prepared.file, judged_on="test")
    place = common.folder / TEST
    for stage in (common.folder / chosen.folder / "stages").iterdir():
        if not (place / "stages" / stage.name / TRAINING).is_file() and not stage.name.startswith("."):
            link_folder(stage, place / "stages" / stage.name, without=("accuracy*",))
    recipes.write_experiment(experiment, place / places.EXPERIMENT)
    judging = partial(judged_on_test, experiment, place, common)
    result = _waited(judging, common.line, interruption, lambda: True)
    write_state(place, "FINISHED")
    return result


def _stage_trainings(trials: Sequence[Trial], stages: int) -> StageTrainings:
    def left(*statuses: str) -> int:
        return sum(stages - trial.stages for trial in trials if trial.status in statuses)

    read = sum(trial.stages for trial in trials if trial.status == "read")
    shared = sum(trial.shared_stages for trial in trials if trial.status != "read")
    return StageTrainings(
        asked=len(trials) * stages,
        run=sum(trial.stages for trial in trials) - read - shared,
        shared=shared,
        read=read,
        stopped_early=left("stopped"),
        failed=left("failed"),
    )


def _importance(search: Search, trials: Sequence[Trial]) -> dict[str, float]:
    from orchestrate.sampling import importance

    return importance(search, trials)


def _forget_models(folder: Path, keep: Trial) -> None:
    """Remove the weights of all trials but one; their results stay."""
    shutil.rmtree(folder / "stages", ignore_errors=True)
    for model in folder.glob("trials/*/stages/*/model"):
        if model.parents[2] != folder / keep.folder:
            shutil.rmtree(model, ignore_errors=True)
