"""Comparisons of runs by method over seeds and orders: marks, tables, LaTeX, and the HTML page."""

import csv
import io
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console
from scipy.stats import ttest_rel
from support.command import Command

from orchestrate.cli.run import summarize_run
from orchestrate.recipes import recipe as recipes
from orchestrate.reports.charts import distinct_colours
from orchestrate.reports.comparison import Comparison, Difference, group_runs, paired_interval
from orchestrate.reports.results import format_method
from orchestrate.reports.tables import build_run_rows, build_terminal_tables, escape_latex
from orchestrate.tracking.lookup import comparison_folder
from orchestrate.tracking.mlflow_client import PARENT
from orchestrate.tracking.uploader import JournalUploader
from schemas.experiment import Experiment
from schemas.method import Method
from schemas.results import Result
from zscl.sequence.resolve import resolve
from zscl.sequence.run import run_sequence

Zscl = Callable[..., Command]
Make = Callable[..., Experiment]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture
def runs(root: Path, experiment: Make) -> dict[str, Path]:
    """Two methods, two seeds each."""
    found = {}
    for method in ("finetune", "zscl"):
        for seed in (0, 1):
            name = f"{method}-{seed}"
            found[name] = root / name
            if not (root / name / "result.json").is_file():
                made = experiment(method=method, seed=seed)
                run_sequence(made, root / name, device=torch.device("cpu"))
                recipes.write_experiment(made, root / name / "experiment.yaml")
    return found


def result_of(run: Path) -> Result:
    return Result.model_validate_json((run / "result.json").read_text())


def compared(zscl: Zscl, *arguments: object) -> dict[str, Any]:
    found = zscl("compare", *arguments, "--json")
    assert found.code == 0, found.error
    content: dict[str, Any] = json.loads(found.out)
    return content


def test_methods_over_seeds(runs: dict[str, Path], zscl: Zscl, tmp_path: Path) -> None:
    content = compared(zscl, *runs.values(), "--out", tmp_path)
    assert list(content["groups"]) == ["finetune", "zscl"]
    group = content["groups"]["zscl"]
    assert group["runs"] == ["zscl-0", "zscl-1"]
    lasts = {name: result_of(run).metrics.last for name, run in runs.items()}
    ours = [lasts["zscl-0"], lasts["zscl-1"]]
    assert group["figures"]["last"]["mean"] == pytest.approx(fmean(ours))
    assert group["figures"]["last"]["deviation"] == pytest.approx(stdev(ours))
    pairs = [lasts[f"zscl-{seed}"] - lasts[f"finetune-{seed}"] for seed in (0, 1)]
    assert group["figures"]["last"]["difference"] == pytest.approx(fmean(pairs))
    theirs = [lasts[f"finetune-{seed}"] for seed in (0, 1)]
    assert group["figures"]["last"]["interval"] == pytest.approx(tuple(ttest_rel(ours, theirs).confidence_interval()))
    assert (group["figures"]["last"]["pairs"], group["figures"]["last"]["unit"]) == (2, "seeds")
    assert content["baseline"] == "finetune"
    matrix = result_of(runs["zscl-0"]).accuracy_matrix
    with (tmp_path / "comparison.csv").open() as stream:
        row = next(row for row in csv.DictReader(stream) if row["run"] == "zscl-0")
    assert float(row["learned"]) == pytest.approx(fmean(matrix[stage][stage] for stage in range(3)))
    assert float(row["images_per_second"]) > 0
    assert float(row["peak_memory_megabytes"]) > 50
    shown = zscl("compare", *runs.values(), "--out", tmp_path)
    assert " ± " in shown.out
    assert "baseline  finetune (by default finetune, else zero-shot, else the first; --baseline METHOD)" in shown.out
    assert "95 % confidence interval (paired t)" in " ".join((tmp_path / "comparison.md").read_text().split())
    wrong = zscl("compare", *runs.values(), "--out", tmp_path, "--baseline", "finetine")
    assert (wrong.code, "did you mean 'finetune'?" in wrong.error) == (2, True)
    other = compared(zscl, *runs.values(), "--out", tmp_path, "--baseline", "zscl")
    assert other["groups"]["finetune"]["figures"]["last"]["difference"] == pytest.approx(-fmean(pairs))


def test_the_latex_table(runs: dict[str, Path], zscl: Zscl, tmp_path: Path) -> None:
    compared(zscl, *runs.values(), "--out", tmp_path)
    table = (tmp_path / "comparison.tex").read_text()
    for command in ("\\toprule", "\\midrule", "\\bottomrule", "\\textbf{"):
        assert command in table
    assert escape_latex(r'a_b=["{x}\y"] 5 % ~^') == (
        r'a\_b=["\{x\}\textbackslash{}y"] 5 \% \textasciitilde{}\textasciicircum{}'
    )
    rows = [line for line in table.splitlines() if line.endswith("\\\\")]
    assert [row.partition(" & ")[0] for row in rows] == ["Method", "zero-shot", "finetune", "zscl"]
    assert all(row.count("&") == 4 for row in rows)


def test_runs_that_cannot_be_compared_are_excluded_with_the_reason(
    runs: dict[str, Path], zscl: Zscl, tmp_path: Path, experiment: Make, tasks: list[str]
) -> None:
    other = tmp_path / "other"
    run_sequence(experiment(method="zero-shot", tasks=tasks[:2]), other, device=torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    content = compared(
        zscl,
        runs["zscl-0"],
        tmp_path / "empty",
        other,
        runs["finetune-0"],
        "--out",
        tmp_path / "out",
    )
    assert [row["run"] for row in content["rows"]] == ["", "zscl-0", "finetune-0"]
    reasons = list(content["left_out"].values())
    assert "found 0 finished stages and no result.json" in reasons[0]
    assert "found the tasks first, second, expected those of the first run: first, second, third" in reasons[1]
    assert "## Left out" in (tmp_path / "out/comparison.md").read_text()
    nothing = zscl("compare", tmp_path / "empty", "--out", tmp_path / "none")
    assert nothing.code == 2
    assert not (tmp_path / "none").exists()
    assert zscl("compare").error == "error: found no runs, expected folders, run ids, or --where EXPRESSION\n"


def test_a_mistyped_run_is_refused_with_a_suggestion(runs: dict[str, Path], zscl: Zscl, tmp_path: Path) -> None:
    near, digits = runs["zscl-0"].with_name("zscl-O"), "0" * 31
    refused = zscl("compare", runs["zscl-0"], near, digits, "--out", tmp_path / "none")
    assert refused.code == 2
    first, second = refused.error.splitlines()
    assert f"{near}: found no such folder, expected a run's folder or its id in MLflow; did you mean 'zscl-" in first
    assert f"{digits}: found no such folder, and this is not a run id; expected a folder, or a run's id" in second
    assert not (tmp_path / "none").exists()


def test_each_selection_of_runs_has_its_own_folder(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    chosen = [comparison_folder({str(run): run for run in runs}) for runs in ((a, b), (a, c), (a, b), (b, a), (a,))]
    assert chosen[0] == chosen[2]
    assert len(set(chosen)) == 4
    assert {root.parent for root in chosen} == {tmp_path / "comparison"}


def test_incomparable_runs_are_marked_and_not_averaged(
    runs: dict[str, Path], zscl: Zscl, tmp_path: Path, experiment: Make
) -> None:
    held_out = {"held_out": {"share": 0.25}, "templates": "first"}
    run_sequence(experiment(method="finetune", evaluation=held_out), tmp_path / "held", device=torch.device("cpu"))
    part = tmp_path / "part"
    shutil.copytree(runs["finetune-1"], part)
    (part / "result.json").unlink()
    (part / "stages/3-third/accuracy.json").unlink()
    groups = compared(zscl, runs["finetune-0"], tmp_path / "held", part, "--out", tmp_path / "out")["groups"]
    assert list(groups) == [
        "finetune",
        "finetune [other data in first, second, third; templates first; judged on held-out images]",
        "finetune [2 of 3 stages]",
    ]
    matrix = result_of(runs["finetune-1"]).accuracy_matrix
    assert groups["finetune [2 of 3 stages]"]["figures"]["last"]["mean"] == pytest.approx(fmean(matrix[1]))
    rows = [row["method"] for row in csv.DictReader((tmp_path / "out/comparison.csv").open()) if not row["run"]]
    assert rows == ["zero-shot", "zero-shot of held"]  # the part's is the first run's
    inside = zscl("compare", runs["finetune-0"].parent, "--out", tmp_path / "none")
    assert (inside.code, "runs in this folder, expected one run, " in inside.error) == (2, True)


def test_other_training_settings_are_marked(
    runs: dict[str, Path], zscl: Zscl, tmp_path: Path, experiment: Make
) -> None:
    optimisation = {**recipes.load_experiment(runs["zscl-1"] / "experiment.yaml").optimisation.model_dump(), "steps": 3}
    made = experiment(method="zscl", seed=1, optimisation=optimisation)
    run_sequence(made, tmp_path / "shorter", device=torch.device("cpu"))
    groups = compared(zscl, runs["zscl-0"], runs["zscl-1"], tmp_path / "shorter", "--out", tmp_path / "out")["groups"]
    assert {label: group["runs"] for label, group in groups.items()} == {
        "zscl": ["zscl-0", "zscl-1"],
        "zscl [steps=3]": ["shorter"],
    }


def test_a_run_counts_once(runs: dict[str, Path], zscl: Zscl, tmp_path: Path) -> None:
    copies = [shutil.copytree(runs["zscl-0"], tmp_path / name) for name in ("again", "and-again")]
    groups = compared(zscl, *runs.values(), *copies, "--out", tmp_path / "out")["groups"]
    again = "same seed and order as zscl-0"
    assert {label: group["runs"] for label, group in groups.items()} == {
        "finetune": ["finetune-0", "finetune-1"],
        "zscl": ["zscl-0", "zscl-1"],
        f"zscl [{again}]": ["again"],
        f"zscl [{again}; same seed and order as again]": ["and-again"],
    }


def test_a_setting_that_one_method_does_not_use_is_no_difference(experiment: Make) -> None:
    """Fine-tuning reads no reference images: their batch sets it apart from nothing."""
    settings = {name: experiment(method=name).settings for name in ("zscl", "finetune", "zero-shot")}
    assert settings["zscl"].keys() - settings["finetune"].keys() == {"optimisation.reference_batch_size"}
    assert all(settings["zscl"][path] == value for path, value in settings["finetune"].items())
    assert settings["zero-shot"] == {}
    assert "tasks.second.shots" in settings["zscl"]


def test_orders_are_compared_task_by_task(
    runs: dict[str, Path], zscl: Zscl, tmp_path: Path, experiment: Make, tasks: list[str]
) -> None:
    made = experiment(method="finetune", tasks=list(reversed(tasks)))
    result = run_sequence(made, tmp_path / "reversed", device=torch.device("cpu"))
    content = compared(zscl, runs["finetune-0"], tmp_path / "reversed", "--out", tmp_path / "out")
    assert content["groups"]["finetune"]["runs"] == ["finetune-0", "reversed"]
    row = next(row for row in content["rows"] if row["run"] == "reversed")
    assert row["order"] == "third, second, first"
    assert row["first"] == result.accuracy_matrix[-1][2]


def test_runs_are_found_in_mlflow(
    root: Path, runs: dict[str, Path], zscl: Zscl, tmp_path: Path, experiment: Make
) -> None:
    ids = []
    for name in ("finetune-0", "zscl-0"):
        made = experiment(method=name.partition("-")[0])
        shipper = JournalUploader(made, resolve(made).fingerprint, runs[name], print)
        assert shipper.end()
        ids.append(shipper.run_id)
    store = ("--uri", f"sqlite:///{root}/mlflow.db", "--out", tmp_path)
    by_id = compared(zscl, *ids, *store)
    found = compared(zscl, "--where", "tags.`zscl.seed` = '0'", *store)
    assert by_id["rows"] == found["rows"]
    moved = runs["zscl-0"].rename(root / "moved")  # what is not on this machine comes from the artefacts
    assert [row["last"] for row in compared(zscl, *ids, *store)["rows"]] == [row["last"] for row in by_id["rows"]]
    moved.rename(runs["zscl-0"])
    other = shutil.copytree(runs["zscl-1"], tmp_path / "other")
    aside = runs["zscl-0"].rename(root / "aside")  # another run lies in the recorded folder by now
    other.rename(runs["zscl-0"])
    instead = [row["seed"] for row in compared(zscl, ids[1], *store)["rows"] if row["run"]]
    shutil.rmtree(runs["zscl-0"])
    aside.rename(runs["zscl-0"])
    assert instead == ["0"]
    unknown = zscl("compare", ids[0][:-1] + ("1" if ids[0][-1] == "0" else "0"), ids[0], *store)
    assert (unknown.code, "found no such run in sqlite:///" in unknown.error) == (2, True)
    assert f"did you mean '{ids[0]}'?" in unknown.error
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    stage = next(
        run.info.run_id
        for run in client.search_runs([client.get_run(ids[0]).info.experiment_id], f"tags.`{PARENT}` = '{ids[0]}'")
    )
    refused = zscl("compare", stage, *store)
    message = f"expected the id of a complete run; the id of this stage's run is {ids[0]}"
    assert (refused.code, message in refused.error) == (2, True)
    for where, sentence in (("tags.x = 'y'", "found no run in"), ("what?", "MLflow does not accept this expression")):
        refused = zscl("compare", "--where", where, *store)
        assert (refused.code, sentence in refused.error) == (2, True)
    assert MlflowClient(f"sqlite:///{root}/mlflow.db").get_run(ids[0]).info.status == "FINISHED"


def test_a_methods_label_has_its_changes(runs: dict[str, Path]) -> None:
    settings = '{"weight": 0.5, "kind": "soft"}'
    changes = {"distill.text_weight": 0.0, "average": None, "custom_losses.spread.Spread": settings}
    result = result_of(runs["zscl-0"]).model_copy(update={"method_changes": changes})
    assert format_method(result) == (
        'zscl (distill.text_weight=0.0, average=null, spread.Spread(weight=0.5, kind="soft"))'
    )
    named = Method.model_validate({"preset": "zscl", "name": "mine", "distill": {"text_weight": 0.0}})
    assert named.changes == {"distill.text_weight": 0.0}


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_an_interval_covers_the_mean_in_95_of_100_cases(count: int) -> None:
    draw, repeats, mean = np.random.default_rng(count), 500, 0.02
    intervals = [paired_interval(draw.normal(mean, 0.05, count).tolist()) for _ in range(repeats)]
    covered = sum(found is not None and found[0] <= mean <= found[1] for found in intervals) / repeats
    assert covered == pytest.approx(0.95, abs=0.04)  # four standard errors


def test_an_interval_is_that_of_a_paired_t_test() -> None:
    ours, theirs = [0.61, 0.67, 0.72, 0.55], [0.51, 0.59, 0.70, 0.41]
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    found = paired_interval([one - other for one, other in zip(ours, theirs, strict=True)])
    assert found == pytest.approx(tuple(expected))


@pytest.mark.parametrize("differences", [[], [0.5], [0.1, 0.1, 0.1], [0.1 + 0.2 - 0.3, 0.0], [0.1, math.nan]])
def test_no_interval_without_a_variance(differences: list[float]) -> None:
    assert paired_interval(differences) is None


def of_figures(result: Result, last: float, **changes: Any) -> Result:
    metrics = result.metrics.model_copy(update={"last": last})
    return result.model_copy(update={"metrics": metrics, **changes})


def gathered(folder: Path, results: dict[str, Result]) -> Comparison:
    for name, result in results.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "result.json").write_text(result.model_dump_json())
    return group_runs({name: folder / name for name in results})


def reordered(result: Result) -> Result:
    return result.model_copy(update={"tasks": result.tasks[::-1]})


def test_pairs_of_one_seed_or_order_are_averaged_first(runs: dict[str, Path], tmp_path: Path) -> None:
    """Three seeds in two orders are a sample of three; so are three orders with one seed."""
    base = result_of(runs["finetune-0"])
    lasts = {(seed, order): 0.3 + 0.05 * seed**2 + 0.02 * order for seed in range(3) for order in range(2)}
    results = {}
    for (seed, order), last in lasts.items():
        for method, figure in (("finetune", 0.2), ("wc", last)):
            made = of_figures(base, figure, seed=seed, method=method)
            results[f"{method}-{seed}-{order}"] = reordered(made) if order else made
    found = gathered(tmp_path, results).difference("wc", "finetune", "last")
    by_seed = [fmean(lasts[seed, order] for order in range(2)) - 0.2 for seed in range(3)]
    assert found == Difference(pytest.approx(fmean(by_seed)), paired_interval(by_seed), 6, 3, "seeds")  # type: ignore[arg-type]
    one_seed = {name: result for name, result in results.items() if result.seed == 0}
    found = gathered(tmp_path / "one", one_seed).difference("wc", "finetune", "last")
    assert found is not None
    assert (found.pairs, found.size, found.unit) == (2, 2, "orders")


def test_runs_without_a_pair_have_no_difference(runs: dict[str, Path], tmp_path: Path) -> None:
    base = result_of(runs["finetune-0"])
    results = {
        "finetune-0": base,
        "wc-0": reordered(base).model_copy(update={"method": "wc"}),
        "wc-1": base.model_copy(update={"method": "wc", "seed": 1}),
    }
    assert gathered(tmp_path, results).difference("wc", "finetune", "last") is None


def test_the_default_baseline(runs: dict[str, Path], tmp_path: Path) -> None:
    base = result_of(runs["finetune-0"])

    def chosen(*methods: str) -> str | None:
        results = {name: base.model_copy(update={"method": name}) for name in methods}
        return gathered(tmp_path / "-".join(methods), results).default_baseline

    assert chosen("aaa", "zero-shot", "finetune") == "finetune"
    assert chosen("aaa", "zero-shot") == "zero-shot"
    assert chosen("zscl", "aaa") == "zscl"
    assert chosen("zscl") is None


def test_methods_of_one_name_are_distinguished_by_their_settings(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its settings are added where another method has the same name: the two are no sample of one method."""

    def of(base: str, **method: Any) -> Result:
        made = Method.model_validate(method)
        settings = {"method": made.name, "method_changes": made.changes, "method_settings": made.settings}
        return result_of(runs[base]).model_copy(update=settings)

    parts: dict[str, Any] = {"name": "mine", "task_loss": {}, "consolidate": {}}
    alone = gathered(tmp_path / "alone", {"a": of("zscl-0", preset="zscl", name="mine", average=None)})
    assert list(alone.groups) == ["mine"]
    two = {
        "a": of("zscl-0", **parts),
        "b": of("zscl-1", **parts | {"consolidate": {"weight": 2.0}}),
        "c": of("finetune-1", **parts | {"consolidate": None}),
    }
    assert list(gathered(tmp_path / "two", two).groups) == [
        "mine (consolidate.weight=1.0)",
        "mine (consolidate.weight=2.0)",
        "mine (consolidate=null)",
    ]


def test_settings_that_the_first_run_does_not_use_distinguish_later_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    """A zero-shot run reads no learning rate: two of fine-tuning are no sample all the same."""
    zero_shot = result_of(runs["zscl-0"]).model_copy(update={"method": "zero-shot", "settings": {}, "reference": ""})
    one, two = result_of(runs["zscl-0"]), result_of(runs["zscl-1"])
    two = two.model_copy(update={"settings": two.settings | {"optimisation.learning_rate": 0.5}, "reference": "other"})
    found = gathered(tmp_path, {"zero-shot": zero_shot, "one": one, "two": two})
    assert list(found.groups) == ["zero-shot", "zscl", "zscl [learning_rate=0.5; other reference set]"]


def test_results_of_another_version_of_the_algorithm_are_marked(runs: dict[str, Path], tmp_path: Path) -> None:
    new, old = result_of(runs["zscl-0"]), result_of(runs["zscl-1"]).model_copy(update={"algorithm": ""})
    marked = "zscl [computed by an algorithm older than version 1.1]"
    assert list(gathered(tmp_path, {"new": new, "old": old}).groups) == ["zscl", marked]


def test_zero_shot_metrics_of_other_models_are_not_averaged(runs: dict[str, Path], tmp_path: Path) -> None:
    one = result_of(runs["finetune-0"])
    better = one.zero_shot_metrics.model_copy(update={"last": 1.0})
    other = one.model_copy(update={"model_digest": "other", "model": "ViT", "zero_shot_metrics": better})
    assert gathered(tmp_path, {"one": one, "other": other}).zero_shot("last") == one.zero_shot_metrics.last


@pytest.mark.parametrize("offline", [True, False])
def test_shown_commands_are_quoted_for_a_shell(runs: dict[str, Path], tmp_path: Path, offline: bool) -> None:
    run = shutil.copytree(runs["zscl-0"], tmp_path / "my runs/it's")
    _, lines = summarize_run(recipes.load_experiment(run / "experiment.yaml"), run, result_of(run), offline)
    shown = shlex.split(next(line for line in lines if line.startswith("MLflow")))[1:]
    assert shown[-1] == (str(run) if offline else f"sqlite:///{run.parent}/mlflow.db")
    assert len(shown) == (3 if offline else 4)


@pytest.mark.parametrize(("count", "width"), [(12, 80), (60, 200)])
def test_tables_of_many_runs_are_not_truncated(runs: dict[str, Path], tmp_path: Path, count: int, width: int) -> None:
    result = result_of(runs["zscl-0"])
    found = gathered(tmp_path, {f"r{seed:02}": result.model_copy(update={"seed": seed}) for seed in range(count)})
    out = io.StringIO()
    Console(file=out, width=width).print(build_terminal_tables(found, build_run_rows(found), None, width))
    shown = out.getvalue().partition("Accuracy on each task")[2]
    assert "…" not in shown
    last = f"{100 * result.accuracy_matrix[-1][0]:.1f} "
    assert sum(line.count(last) for line in shown.splitlines() if "│ first" in line) >= count
    assert all(f" r{seed:02} " in shown for seed in range(count))
    assert len(set(distinct_colours(count))) == count


def test_runs_with_equal_folder_names_get_distinct_names(runs: dict[str, Path], tmp_path: Path) -> None:
    places = [tmp_path / "a/zscl", tmp_path / "b/zscl", tmp_path / "b/other"]
    for number, root in enumerate(places):
        shutil.copytree(runs["zscl-1"], root)
        seeded = result_of(root).model_copy(update={"workers": 1 + number, "seed": number})
        (root / "result.json").write_text(seeded.model_dump_json())
    found = group_runs({str(root): root for root in [*places, tmp_path / "a/../a/zscl"]})
    assert [run.name for run in found.runs] == ["a/zscl", "b/zscl", "other"]
    assert [row["worker_hours"] for row in build_run_rows(found) if row["run"]] == sorted(
        row["worker_hours"] or 0 for row in build_run_rows(found) if row["run"]
    )
    [again] = found.excluded.values()
    assert "it counts once" in again


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_works_without_a_network(runs: dict[str, Path], zscl: Zscl, tmp_path: Path) -> None:
    compared(zscl, *runs.values(), "--out", tmp_path, "--published", "I")
    page = tmp_path / "comparison.html"
    assert page.stat().st_size < 3_000_000
    assert " src=" not in page.read_text().partition("<script")[0]

    def drawn(query: str = "") -> str:
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--dump-dom",
            f"file://{page}{query}",
        ]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
        assert 'data-ready="yes"' in dom
        return dom.rpartition("<script")[0]

    body = drawn()
    assert body.count("<svg") == 4  # figures, accuracies, matrices, losses
    for label in ("Task ", "Method ", "Stage "):
        assert label in body
    assert "published, MTIL order I" in body
    assert body.count("<option") == 1 + 2 + 1 + 3 + 3  # methods, tasks, stages
    whole, one = (
        text.partition('id="chart-matrices"')[2].partition("</section>")[0]
        for text in (body, drawn("?method=finetune&task=second"))
    )
    assert all(name in whole for name in ("zscl-0", "finetune-0", ">first<", ">second<"))
    assert all(name in one for name in ("finetune-0", ">second<"))
    assert not any(name in one for name in ("zscl-0", ">first<"))
    beginning = drawn("?method=fine").partition('id="chart-matrices"')[2].partition("</section>")[0]
    assert ("finetune-0" in beginning, "zscl-0" in beginning) == (True, False)
