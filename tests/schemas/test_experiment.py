"""Validation of recipes: error codes, fields, presets, expansion of paths, warm-up and fingerprints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.errors import refused

from schemas.base import Problem, explain, input_error, list_problems
from schemas.data import Task
from schemas.errors import ErrorCode
from schemas.experiment import Experiment
from schemas.method import PRESETS, Method

Recipe = Callable[..., dict[str, Any]]
CONFLICT, INVALID, MISSING = ErrorCode.CONFLICT, ErrorCode.INVALID_VALUE, ErrorCode.MISSING_VALUE
UNKNOWN, UNUSED = ErrorCode.UNKNOWN_NAME, ErrorCode.UNUSED_SETTING


def validate(content: dict[str, Any]) -> Experiment:
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise input_error(error) from error


def zscl(**distill: Any) -> dict[str, Any]:
    return {"method": {"preset": "zscl", "distill": distill}}


SAVINGS = "compute.savings"
NO_WEIGHTS = {"image_weight": 0.0, "text_weight": 0.0}


@pytest.mark.parametrize(
    ("changes", "code", "field", "content"),
    [
        ({"compute": {"workers": 4, "min_workers": 2, "evaluation": "overlapped"}}, CONFLICT, "compute.evaluation", ""),
        ({"compute": {"min_workers": 2}}, INVALID, "compute.min_workers", "at most workers, which is 1"),
        ({"compute": {"storage": "/runs"}}, INVALID, "compute.storage", "expected a URL"),
        ({"compute": {"workers": 7}}, INVALID, "compute.workers", "at most 5"),
        ({"methd": "zscl"}, UNKNOWN, "methd", "did you mean 'method'?"),
        (zscl(temprature=1), UNKNOWN, "method.distill.temprature", "did you mean 'temperature'?"),
        ({"method": "zcl"}, INVALID, "method.preset", "'zero-shot', 'finetune', 'we', 'wc', 'we+wc', 'wise-ft', 'lwf'"),
        ({"method": "zcl"}, INVALID, "method.preset", "did you mean 'zscl'?"),
        ({"optimisation": {"steps": "10"}}, INVALID, "optimisation.steps", "found '10' in quotes"),
        ({"optimisation": {"learning_rate": 0.0}}, INVALID, "optimisation.learning_rate", "a value greater than 0"),
        ({"tasks": [{"name": "a"}]}, MISSING, "tasks.0.path", "found nothing"),
        ({"tasks": []}, MISSING, "tasks", "class_incremental"),
        ({"tasks": ["a/b", "c/b"]}, ErrorCode.DUPLICATE, "tasks", "'b'"),
        ({"tasks": ["a/avg"]}, INVALID, "tasks", "'avg'"),
        ({"reference": None}, MISSING, "reference", "method.distill"),
        ({"model": "ViT-B-16"}, MISSING, "model.pretrained", "'ViT-B-16'"),
        ({"model": {"name": "embedded", "pretrained": "openai"}}, CONFLICT, "model.pretrained", "'embedded'"),
        ({"method": {"distill": {}}}, MISSING, "method.task_loss", "distill cannot be used"),
        ({"method": {"preset": "zero-shot", "merge": {}}}, MISSING, "method.task_loss", "merge cannot be used"),
        ({"method": {"preset": "icarl", "memory": None}}, MISSING, "method.memory", "exemplars"),
        ({"method": {"preset": "zscl", "memory": {}}}, UNUSED, "method.memory", "exemplars"),
        ({"method": {"preset": "zscl", "train": "text_tower"}}, CONFLICT, "method.train", "image_tower"),
        ({"method": {"preset": "zero-shot", "train": "image_tower"}}, UNUSED, "method.train", "task_loss"),
        (zscl(blend=0.5), UNUSED, "method.distill.blend", "teacher: blended"),
        (zscl(prompts_of="all"), UNUSED, "method.distill.prompts_of", "texts: class_prompts"),
        (zscl(random_texts=5), UNUSED, "method.distill.random_texts", "texts: random_tokens"),
        (zscl(**NO_WEIGHTS, feature_weight=1.0, temperature=3.0), UNUSED, "method.distill.temperature", "3.0"),
        (zscl(**NO_WEIGHTS), INVALID, "method.distill", "image_weight, text_weight, similarity_weight, feature_weight"),
        ({"method": {"preset": "we", "average": {"decay": 0.5}}}, UNUSED, "method.average.decay", "kind: exponential"),
        (
            {"tasks": ["a"], "method": {"preset": "lwf", "distill": {"prompts_of": "others"}}},
            CONFLICT,
            "method.distill.prompts_of",
            "several tasks, found one",
        ),
        (
            zscl(similarity_weight=1.0) | {"optimisation": {"reference_batch_size": 1}},
            INVALID,
            "optimisation.reference_batch_size",
            "method.distill.similarity_weight",
        ),
        (
            {"optimisation": {"weight_decay": 0.1}, "compute": {"savings": {"used_embeddings": "always"}}},
            CONFLICT,
            f"{SAVINGS}.used_embeddings",
            "optimisation.weight_decay",
        ),
        (
            {"method": {"preset": "we", "train": "image_tower"}, "compute": {"savings": {"used_embeddings": "always"}}},
            CONFLICT,
            f"{SAVINGS}.used_embeddings",
            "the text tower is not trained",
        ),
        (
            {"compute": {"savings": {"packed_prompts": "always", "context_cut": "never"}}},
            CONFLICT,
            f"{SAVINGS}.packed_prompts",
            "context_cut",
        ),
        ({"compute": {"savings": {"context_cut": "yes"}}}, INVALID, f"{SAVINGS}.context_cut", "expected 'auto'"),
        ({"method": "lwf", "compute": {"teacher_features": "ahead"}}, CONFLICT, "compute.teacher_features", "auto"),
    ],
)  # fmt: skip
def test_invalid_recipes(recipe: Recipe, changes: dict[str, Any], code: ErrorCode, field: str, content: str) -> None:
    with refused(code, field) as error:
        validate(recipe(**changes))
    assert content in str(error.value)
    assert "\n" not in str(error.value)


def test_every_problem_has_its_line_code_and_field(recipe: Recipe) -> None:
    with pytest.raises(ValidationError) as error:
        Experiment.model_validate(recipe(seed=-1, optimisation={"stepps": 5}, tasks=[{"name": "a"}]))
    assert [(problem.field, problem.code) for problem in list_problems(error.value)] == [
        ("tasks.0.path", MISSING),
        ("optimisation.stepps", UNKNOWN),
        ("seed", INVALID),
    ]
    assert list_problems(error.value)[0] == Problem(
        "tasks.0.path", "tasks.0.path: found nothing, expected a value", MISSING
    )
    assert len(explain(error.value).splitlines()) == 3
    named = input_error(error.value, "another message", field="--set")
    assert (str(named), named.code, named.field) == ("another message", MISSING, "--set")


def test_a_list_with_wrong_items_is_not_also_too_short() -> None:
    with pytest.raises(ValidationError) as error:
        Experiment.model_validate({"model": "embedded", "method": "zscl", "tasks": ["a"], "reference": {"images": [1]}})
    assert [problem.field for problem in list_problems(error.value)] == ["reference.images.0"]


COMPOSITIONS = {
    "zero-shot": set(),
    "finetune": {"task_loss"},
    "we": {"task_loss", "average"},
    "wc": {"task_loss", "consolidate"},
    "we+wc": {"task_loss", "average", "consolidate"},
    "wise-ft": {"task_loss", "merge"},
    "lwf": {"task_loss", "distill"},
    "lwf-vr": {"task_loss", "distill"},
    "icarl": {"task_loss", "distill", "memory"},
    "zscl*": {"task_loss", "distill", "average"},
    "zscl": {"task_loss", "distill", "average", "consolidate"},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_compositions(preset: str) -> None:
    method = Method.model_validate(preset)
    parts = ("task_loss", "distill", "average", "consolidate", "merge", "memory")
    assert {part for part in parts if getattr(method, part)} == COMPOSITIONS[preset]
    assert method.name == preset
    assert method.changes == {}
    assert method.needs_reference == preset.startswith("zscl")


def test_a_changed_part_has_the_other_fields_of_the_preset() -> None:
    method = Method.model_validate({"preset": "lwf", "distill": {"temperature": 3.0}})
    assert method.distill is not None
    assert (method.distill.teacher, method.distill.images, method.distill.temperature) == ("previous", "task", 3.0)
    assert method.changes == {"distill.temperature": 3.0}


def test_changes_of_a_preset() -> None:
    assert Method.model_validate("zscl").changes == {}
    changed = Method.model_validate({"preset": "zscl", "average": {"every": 7}, "consolidate": None})
    assert changed.name == "zscl"
    assert changed.changes == {"average.every": 7, "consolidate": None}
    added = Method.model_validate({"preset": "finetune", "merge": {"share": 0.5}})
    assert added.changes == {"merge.anchor": "stage_start", "merge.share": 0.5}
    assert Method.model_validate(changed.model_dump()) == changed


def test_json_round_trip(recipe: Recipe) -> None:
    experiment = Experiment.model_validate(recipe())
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_relative_paths_are_relative_to_the_root_and_urls_do_not_change(recipe: Recipe) -> None:
    content = recipe(tasks=["a/one", "s3://bucket/two"], model="local-dir:clip")
    experiment = Experiment.model_validate(content, context={"root": "/here"})
    assert [task.path for task in experiment.tasks] == ["/here/a/one", "s3://bucket/two"]
    assert [task.name for task in experiment.tasks] == ["one", "two"]
    assert experiment.model.name == "local-dir:/here/clip"


def test_variables_and_the_home_folder_are_expanded_in_paths(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("BUCKET", "mine")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "$NOWHERE").mkdir()  # a folder that is called so
    paths = ["$DATA/one", "~/two", "${DATA}/{0..9}/three", "s3://$BUCKET/four", "$NOWHERE", "s3://b/$NOWHERE/six"]
    content = recipe(tasks=[{"path": path, "name": f"t{k}"} for k, path in enumerate(paths)], model="local-dir:$DATA/m")
    experiment = Experiment.model_validate(content, context={"root": str(tmp_path)})
    assert [task.path for task in experiment.tasks] == [
        "/data/one", "/home/me/two", "/data/{0..9}/three", "s3://mine/four", f"{tmp_path}/$NOWHERE",
        "s3://b/$NOWHERE/six",
    ]  # fmt: skip
    assert experiment.model.name == "local-dir:/data/m"
    uris = {"sqlite:///~/a.db": "sqlite:////home/me/a.db", "http://u:pa$DATA@h": "http://u:pa$DATA@h"}
    for uri, expanded in uris.items():
        assert Experiment.model_validate(recipe(tracking={"uri": uri})).tracking.uri == expanded
    for path in ("x/$NOWHERE/y", "${NOWHERE}"):
        with pytest.raises(ValidationError, match="NOWHERE") as error:
            Experiment.model_validate(recipe(tasks=[path]), context={"root": str(tmp_path)})
        assert input_error(error.value).field == "tasks.0.path"


class TestWarmUp:
    """The default depends on the stage's length."""

    def of(self, recipe: Recipe, optimisation: dict[str, Any], *steps: int | None) -> Experiment:
        tasks = [{"path": f"/tasks/{k}", "steps": count} for k, count in enumerate(steps)]
        return validate(recipe(tasks=tasks, method="finetune", optimisation=optimisation))

    @pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (4, 0), (10, 1), (250, 25), (1000, 100), (5000, 100)])
    def test_default_is_a_tenth_of_the_steps(self, recipe: Recipe, steps: int, warmup: int) -> None:
        experiment = self.of(recipe, {"steps": steps}, None)
        assert experiment.stage_warmup(experiment.tasks[0]) == experiment.warmup_steps == warmup

    def test_stages_of_different_lengths(self, recipe: Recipe) -> None:
        experiment = self.of(recipe, {}, None, 40)
        assert [experiment.stage_warmup(task) for task in experiment.tasks] == [100, 4]
        assert experiment.warmup_steps is None
        given = self.of(recipe, {"warmup_steps": 7}, None, 40)
        assert [given.stage_warmup(task) for task in given.tasks] == [7, 7]

    def test_must_not_exceed_the_steps_of_a_stage(self, recipe: Recipe) -> None:
        with refused(ErrorCode.INVALID_VALUE, "optimisation.warmup_steps") as error:
            self.of(recipe, {"warmup_steps": 41}, None, 40)
        assert "the 40 steps of stage '1'" in str(error.value)

    def test_the_default_and_the_same_explicit_value_are_the_same_experiment(self) -> None:
        content = {"model": "embedded", "tasks": ["/here/a"], "method": "finetune"}
        contents = {"/here/a": "content of a", "embedded": "weights"}
        experiment = Experiment.model_validate(content)
        # The default was 100 steps in earlier versions; fingerprints of such runs must not change.
        assert experiment.identity(contents)["optimisation"]["warmup_steps"] == 100
        given = Experiment.model_validate(content | {"optimisation": {"warmup_steps": 100}})
        assert given.fingerprint(contents) == experiment.fingerprint(contents)
        assert given.settings == experiment.settings
        other = Experiment.model_validate(content | {"optimisation": {"warmup_steps": 99}})
        assert other.fingerprint(contents) != experiment.fingerprint(contents)


class TestFingerprint:
    """The fingerprint depends on everything that changes results, and on nothing else."""

    def of(self, content: dict[str, Any], **digests: str) -> str:
        experiment = Experiment.model_validate(content)
        contents = {task.path: f"content of {task.name}" for task in experiment.tasks}
        return experiment.fingerprint(contents | {experiment.model.name: "weights", "reference": "texts"} | digests)

    @pytest.mark.parametrize(
        "changes",
        [{"name": "other"}, {"compute": {"workers": 2, "device": "gpu"}}, {"tracking": {"experiment": "other"}}],
    )
    def test_name_and_infrastructure_do_not_count(self, recipe: Recipe, changes: dict[str, Any]) -> None:
        assert self.of(recipe(**changes)) == self.of(recipe())

    @pytest.mark.parametrize(
        "changes",
        [
            {"seed": 1},
            {"method": "zscl*"},
            {"optimisation": {"steps": 6, "warmup_steps": 2}},
            {"evaluation": {"templates": "first"}},
        ],
    )
    def test_settings_that_change_results_count(self, recipe: Recipe, changes: dict[str, Any]) -> None:
        assert self.of(recipe(**changes)) != self.of(recipe())

    def test_name_of_the_method_does_not_count(self, recipe: Recipe) -> None:
        parts: dict[str, Any] = {"task_loss": {}, "distill": {}, "average": {"every": 2}, "consolidate": {}}
        named = {"preset": "zscl", "name": "mine", "average": {"every": 2}}
        composed, other = {"name": "yours", **parts}, {"preset": "zscl", "average": {"every": 3}}
        assert self.of(recipe(method=named)) == self.of(recipe(method=composed))
        assert self.of(recipe(method=named)) != self.of(recipe(method=other))

    @pytest.mark.parametrize("version", ["ALGORITHM_VERSION", "FEATURES_VERSION"])
    def test_the_version_of_the_algorithm_counts(
        self, recipe: Recipe, version: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = self.of(recipe())
        monkeypatch.setattr(f"schemas.algorithm.{version}", 1_000)
        assert self.of(recipe()) != before

    def test_order_and_content_count(self, recipe: Recipe, tasks: list[str]) -> None:
        assert self.of(recipe(tasks=tasks[::-1])) != self.of(recipe())
        assert self.of(recipe(), reference="other texts") != self.of(recipe())

    def test_unused_inputs_do_not_count(self, recipe: Recipe) -> None:
        assert self.of(recipe(method="finetune"), reference="other texts") == self.of(recipe(method="finetune"))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("data/birds_2.v1-b", "birds_2.v1-b"),
        ("animal photos", "animal-photos"),
        ("tiere-\u00fcbung", "tiere-ubung"),
        ("a[b]{c}%20?", "a-b-c-20"),
        ("n" * 250, "n" * 100),
        ("s3://bucket/my task", "my-task"),
        ("https://me:secret@host/a/birds?sig=secret&x=secret", "birds"),
        ("https://me:secret@host", "host"),
        ("s3://bucket", "bucket"),
    ],
)
def test_default_name_of_a_task(folder: str, name: str) -> None:
    assert Task.model_validate(folder).name == name


def test_a_folder_without_letters_and_digits_needs_a_name() -> None:
    with pytest.raises(ValidationError, match="'\u52d5\u7269'") as error:
        Task.model_validate("data/\u52d5\u7269")
    assert (input_error(error.value).code, input_error(error.value).field) == (ErrorCode.MISSING_VALUE, "name")
    assert Task.model_validate({"path": "data/\u52d5\u7269", "name": "animals"}).name == "animals"
    with pytest.raises(ValidationError, match="at most 100"):
        Task.model_validate({"path": "a", "name": "n" * 101})
