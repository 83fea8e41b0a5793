"""What a recipe may say, and what it is told when it says something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.base import explain
from schemas.data import Task
from schemas.experiment import Experiment
from schemas.method import PRESETS, Method

Recipe = Callable[..., dict[str, Any]]


def refused(content: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        Experiment.model_validate(content)
    return explain(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"compute": {"workers": 4, "min_workers": 2, "evaluation": "overlapped"}},
            "compute: evaluation is overlapped with min_workers, expected inline: an elastic group takes the room",
        ),
        ({"methd": "zscl"}, "unknown field 'methd'; did you mean 'method'?"),
        (
            {"method": {"preset": "zscl", "distill": {"temprature": 1}}},
            "method.distill: unknown field 'temprature'; did you mean 'temperature'?",
        ),
        (
            {"method": "zcl"},
            "found 'zcl', expected 'zero-shot', 'finetune', 'we', 'wc', 'we+wc', 'wise-ft', 'lwf', "
            "'lwf-vr', 'icarl', 'zscl*' or 'zscl'; did you mean 'zscl'?",
        ),
        ({"optimisation": {"steps": "10"}}, "optimisation.steps: found '10' in quotes"),
        (
            {"optimisation": {"learning_rate": 0.0}},
            "optimisation.learning_rate: found 0.0, expected a value greater than 0",
        ),
        ({"tasks": []}, "tasks: found none, expected at least one (or class_incremental)"),
        ({"tasks": ["a/b", "c/b"]}, "found the name 'b' twice"),
        ({"reference": None}, "method.distill needs reference"),
        ({"model": "ViT-B-16"}, "found no pretrained beside 'ViT-B-16', expected the weights"),
        ({"model": {"name": "embedded", "pretrained": "openai"}}, "'embedded' brings its weights"),
        ({"compute": {"workers": 7}}, "compute.workers is 7, expected at most 5"),
        ({"method": {"distill": {}}}, "found distill without task_loss"),
        ({"method": {"preset": "zero-shot", "merge": {}}}, "found merge without task_loss"),
        ({"method": {"preset": "icarl", "memory": None}}, "distill.images is exemplars without memory"),
        ({"method": {"preset": "zscl", "memory": {}}}, "found memory, but nothing reads it"),
        ({"method": {"preset": "zscl", "train": "text_tower"}}, "train is text_tower with distill"),
        (
            {"method": {"preset": "zscl", "distill": {"blend": 0.5}}},
            "method.distill: found blend 0.5, which nothing reads, expected teacher: blended beside it",
        ),
        (
            {"method": {"preset": "zscl", "distill": {"prompts_of": "all"}}},
            "found prompts_of 'all', which nothing reads, expected texts: class_prompts beside it",
        ),
        ({"method": {"preset": "zscl", "distill": {"random_texts": 5}}}, "expected texts: random_tokens beside it"),
        ({"method": {"preset": "we", "average": {"decay": 0.5}}}, "expected kind: exponential beside it"),
        (
            {"tasks": ["a"], "method": {"preset": "lwf", "distill": {"prompts_of": "others"}}},
            "method.distill.prompts_of is others, but there is only one task",
        ),
        (
            {
                "method": {"preset": "zscl", "distill": {"similarity_weight": 1.0}},
                "optimisation": {"reference_batch_size": 1},
            },
            "optimisation.reference_batch_size is 1 with method.distill.similarity_weight",
        ),
        (
            {
                "optimisation": {"weight_decay": 0.1},
                "compute": {"savings": {"used_embeddings": "always"}},
            },
            "compute.savings.used_embeddings is always, expected auto or never: the unused embeddings decay, too",
        ),
        (
            {"method": {"preset": "we", "train": "image_tower"}, "compute": {"savings": {"used_embeddings": "always"}}},
            "compute.savings.used_embeddings is always, expected auto or never: the text tower is not trained",
        ),
        (
            {"compute": {"savings": {"packed_prompts": "always", "context_cut": "never"}}},
            "compute.savings: packed_prompts is always with context_cut never",
        ),
        ({"method": "lwf", "compute": {"teacher_features": "ahead"}}, "compute.teacher_features is ahead"),
        ({"method": {"preset": "zero-shot", "train": "image_tower"}}, "which nothing reads, expected task_loss"),
        (
            {
                "method": {
                    "preset": "zscl",
                    "distill": {"image_weight": 0.0, "text_weight": 0.0, "feature_weight": 1.0, "temperature": 3.0},
                }
            },
            "found temperature 3.0, which nothing reads, expected another weight than feature_weight beside it",
        ),
        ({"compute": {"savings": {"context_cut": "yes"}}}, "compute.savings.context_cut: found 'yes', expected 'auto'"),
        (
            {"method": {"preset": "zscl", "distill": {"image_weight": 0.0, "text_weight": 0.0}}},
            "image_weight, text_weight, similarity_weight, feature_weight are all 0",
        ),
    ],
)
def test_refuses_with_one_clear_sentence(recipe: Recipe, changes: dict[str, Any], sentence: str) -> None:
    found = refused(recipe(**changes))
    assert sentence in found
    assert "\n" not in found


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


def test_changing_a_field_of_a_part_keeps_the_presets_others() -> None:
    method = Method.model_validate({"preset": "lwf", "distill": {"temperature": 3.0}})
    assert method.distill is not None
    assert (method.distill.teacher, method.distill.images, method.distill.temperature) == ("previous", "task", 3.0)
    assert method.changes == {"distill.temperature": 3.0}


def test_a_changed_preset_says_what_was_changed() -> None:
    assert Method.model_validate("zscl").changes == {}
    changed = Method.model_validate({"preset": "zscl", "average": {"every": 7}, "consolidate": None})
    assert changed.name == "zscl"
    assert changed.changes == {"average.every": 7, "consolidate": None}
    added = Method.model_validate({"preset": "finetune", "merge": {"share": 0.5}})
    assert added.changes == {"merge.anchor": "stage_start", "merge.share": 0.5}
    assert Method.model_validate(changed.model_dump()) == changed


def test_survives_json(recipe: Recipe) -> None:
    made = Experiment.model_validate(recipe())
    assert Experiment.model_validate_json(made.model_dump_json()) == made


def test_relative_paths_count_from_the_root_and_urls_are_left_alone(recipe: Recipe) -> None:
    content = recipe(tasks=["a/one", "s3://bucket/two"], model="local-dir:clip")
    made = Experiment.model_validate(content, context={"root": "/here"})
    assert [task.path for task in made.tasks] == ["/here/a/one", "s3://bucket/two"]
    assert [task.name for task in made.tasks] == ["one", "two"]
    assert made.model.name == "local-dir:/here/clip"


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
    made = Experiment.model_validate(content, context={"root": str(tmp_path)})
    assert [task.path for task in made.tasks] == [
        "/data/one", "/home/me/two", "/data/{0..9}/three", "s3://mine/four", f"{tmp_path}/$NOWHERE",
        "s3://b/$NOWHERE/six",
    ]  # fmt: skip
    assert made.model.name == "local-dir:/data/m"
    uris = {"sqlite:///~/a.db": "sqlite:////home/me/a.db", "http://u:pa$DATA@h": "http://u:pa$DATA@h"}
    for uri, expanded in uris.items():
        assert Experiment.model_validate(recipe(tracking={"uri": uri})).tracking.uri == expanded
    for path in ("x/$NOWHERE/y", "${NOWHERE}"):
        with pytest.raises(ValidationError, match="in which the environment variable NOWHERE is not set"):
            Experiment.model_validate(recipe(tasks=[path]), context={"root": str(tmp_path)})


class TestWarmUp:
    """A default that fits every stage, and changes nothing where it fits already."""

    def of(self, recipe: Recipe, optimisation: dict[str, Any], *steps: int | None) -> Experiment:
        tasks = [{"path": f"/tasks/{k}", "steps": own} for k, own in enumerate(steps)]
        return Experiment.model_validate(recipe(tasks=tasks, method="finetune", optimisation=optimisation))

    @pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (4, 0), (10, 1), (250, 25), (1000, 100), (5000, 100)])
    def test_by_default_it_is_a_tenth_of_the_steps(self, recipe: Recipe, steps: int, warmup: int) -> None:
        made = self.of(recipe, {"steps": steps}, None)
        assert made.stage_warmup(made.tasks[0]) == made.warmup_steps == warmup

    def test_each_stage_has_its_own(self, recipe: Recipe) -> None:
        made = self.of(recipe, {}, None, 40)
        assert [made.stage_warmup(task) for task in made.tasks] == [100, 4]
        assert made.warmup_steps is None
        given = self.of(recipe, {"warmup_steps": 7}, None, 40)
        assert [given.stage_warmup(task) for task in given.tasks] == [7, 7]

    def test_what_is_given_must_fit(self, recipe: Recipe) -> None:
        with pytest.raises(ValidationError, match="warmup_steps is 41, expected at most the 40 steps of stage '1'"):
            self.of(recipe, {"warmup_steps": 41}, None, 40)

    def test_the_default_and_the_same_given_are_one_experiment(self) -> None:
        content = {"model": "embedded", "tasks": ["/here/a"], "method": "finetune"}
        contents = {"/here/a": "content of a", "embedded": "weights"}
        made = Experiment.model_validate(content)
        # As while the default was 100 steps: runs of the default steps are found again.
        assert made.identity(contents)["optimisation"]["warmup_steps"] == 100
        given = Experiment.model_validate(content | {"optimisation": {"warmup_steps": 100}})
        assert given.fingerprint(contents) == made.fingerprint(contents)
        assert given.settings == made.settings
        other = Experiment.model_validate(content | {"optimisation": {"warmup_steps": 99}})
        assert other.fingerprint(contents) != made.fingerprint(contents)


class TestFingerprint:
    """Only what is computed counts."""

    def of(self, content: dict[str, Any], **digests: str) -> str:
        made = Experiment.model_validate(content)
        contents = {task.path: f"content of {task.name}" for task in made.tasks}
        return made.fingerprint(contents | {made.model.name: "weights", "reference": "texts"} | digests)

    @pytest.mark.parametrize(
        "changes",
        [{"name": "other"}, {"compute": {"workers": 2, "device": "gpu"}}, {"tracking": {"experiment": "other"}}],
    )
    def test_where_and_what_it_is_called_do_not_count(self, recipe: Recipe, changes: dict[str, Any]) -> None:
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
    def test_what_is_computed_counts(self, recipe: Recipe, changes: dict[str, Any]) -> None:
        assert self.of(recipe(**changes)) != self.of(recipe())

    def test_what_the_method_is_called_does_not_count(self, recipe: Recipe) -> None:
        parts: dict[str, Any] = {"task_loss": {}, "distill": {}, "average": {"every": 2}, "consolidate": {}}
        named = {"preset": "zscl", "name": "mine", "average": {"every": 2}}
        spelt_out, other = {"name": "yours", **parts}, {"preset": "zscl", "average": {"every": 3}}
        assert self.of(recipe(method=named)) == self.of(recipe(method=spelt_out))
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

    def test_what_the_method_does_not_read_does_not_count(self, recipe: Recipe) -> None:
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
def test_a_task_is_named_after_its_folder_as_far_as_a_name_goes(folder: str, name: str) -> None:
    assert Task.model_validate(folder).name == name


def test_a_folder_that_names_no_task_needs_a_name_beside_it() -> None:
    with pytest.raises(ValidationError, match="'\u52d5\u7269', which makes no task's name, expected name:"):
        Task.model_validate("data/\u52d5\u7269")
    assert Task.model_validate({"path": "data/\u52d5\u7269", "name": "animals"}).name == "animals"
    with pytest.raises(ValidationError, match="at most 100"):
        Task.model_validate({"path": "a", "name": "n" * 101})
