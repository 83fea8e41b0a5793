"""Recipes: YAML, overrides, tables of variants, and error messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML
from support.command import Command
from support.errors import refused

from orchestrate.recipes import recipe as recipes
from orchestrate.recipes.variants import ALL_VARIANTS, load_variants
from orchestrate.recipes.yaml_loader import dump_yaml
from orchestrate.runs import preflight
from schemas.algorithm import algorithm_version
from schemas.errors import ErrorCode, InputError
from schemas.experiment import Experiment
from schemas.pretraining import Pretraining

SHIPPED = sorted((Path(__file__).parents[3] / "experiments").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path, recipe: Callable[..., dict[str, Any]]) -> Path:
    file = tmp_path / "mine.yaml"
    content = recipe(seed=0)
    del content["name"]
    YAML(typ="safe").dump(content, file)
    return file


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_recipe_is_valid_and_starts_with_its_command(shipped: Path) -> None:
    content = recipes.read_recipe(shipped)
    if "corpus" in content:
        assert recipes.parse_recipe(Pretraining, content, shipped)
    elif "search" in content:
        search, base = recipes.load_search(shipped)
        for path, domain in search.domains.items():
            for end in domain.values_to_check:
                assert recipes.build_trial_experiment(search, base, {path: end}, shipped)
    else:
        assert load_variants(shipped, variant=ALL_VARIANTS if "variants" in content else None)
    head = shipped.read_text().partition("\n\n")[0]
    assert head.startswith("# ")
    assert f"experiments/{shipped.name}" in head


def test_name_is_the_files_and_1e_5_is_a_number(file: Path) -> None:
    file.write_text(file.read_text().replace("learning_rate: 0.01", "learning_rate: 1e-5"))
    found = recipes.load_experiment(file)
    assert found.name == "mine"
    assert found.optimisation.learning_rate == 1e-5


def test_a_written_experiment_reads_back_equal(file: Path, tmp_path: Path) -> None:
    found = recipes.load_experiment(file)
    recipes.write_experiment(found, tmp_path / "experiment.yaml")
    assert recipes.load_experiment(tmp_path / "experiment.yaml") == found


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimisation.steps=7", lambda parsed: parsed.optimisation.steps == 7),
        ("optimisation.learning_rate=1e-4", lambda parsed: parsed.optimisation.learning_rate == 1e-4),
        (
            "method=finetune",
            lambda parsed: parsed.method.name == "finetune" and parsed.method.distill is None,
        ),
        ("method.consolidate=null", lambda parsed: parsed.method.consolidate is None),
        ("method.distill.temperature=3", lambda parsed: parsed.method.distill.temperature == 3),
        ("evaluation.templates=first", lambda parsed: parsed.evaluation.templates == "first"),
        ("tasks.1.learning_rate=0.5", lambda parsed: parsed.tasks[1].learning_rate == 0.5),
        ("tasks=[a/x, a/y]", lambda parsed: [task.name for task in parsed.tasks] == ["x", "y"]),
        (
            "reference.max_texts=3",
            lambda parsed: parsed.reference.max_texts == 3 and parsed.reference.images,
        ),
    ],
)
def test_overrides_reach_every_field(file: Path, override: str, value: Callable[[Experiment], bool]) -> None:
    assert value(recipes.load_experiment(file, [override]))


def test_overrides_apply_in_order(file: Path) -> None:
    found = recipes.load_experiment(file, ["method=zscl", "method.average.every=3"])
    assert found.method.changes == {"average.every": 3}


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("model: a\nmodel: b\n", ErrorCode.UNREADABLE, 'found duplicate key "model"'),
        ("model: [", ErrorCode.UNREADABLE, "found no readable YAML"),
        ("- a\n", ErrorCode.INVALID_VALUE, "found a list, expected fields such as"),
        ("model: !!python/object/apply:os.system [true]\n", ErrorCode.UNREADABLE, "found no readable YAML"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, content: str, code: ErrorCode, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with refused(code) as error:
        recipes.load_experiment(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "code", "field", "message"),
    [
        ("steps", ErrorCode.INVALID_VALUE, "--set", "expected a.b.c=value"),
        ("tasks.9.steps=1", ErrorCode.UNKNOWN_NAME, "tasks.9", "found position '9', expected 0 to 2"),
        ("seed=[", ErrorCode.UNREADABLE, "seed", "found no readable value"),
        ("optimisation.step=1", ErrorCode.UNKNOWN_NAME, "optimisation.step", "did you mean 'steps'?"),
        ("seed.deep=1", ErrorCode.INVALID_VALUE, "seed", "--set seed: found the value 0, expected a section"),
    ],
)
def test_a_wrong_override_is_refused(file: Path, override: str, code: ErrorCode, field: str, message: str) -> None:
    with refused(code, field) as error:
        recipes.load_experiment(file, [override])
    assert message in str(error.value)


def test_dry_run_prints_a_plan_and_starts_nothing(
    file: Path, tmp_path: Path, zscl: Callable[..., Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = zscl("run", file, "--dry-run")
    assert found.code == 0
    plan = YAML(typ="safe").load(found.out)["plan"]
    assert plan["stages"] == ["first", "second", "third"]
    assert (plan["steps"], plan["images_through_student"]) == (15, 15 * (6 + 5))
    assert (plan["reference_images"], plan["reference_texts"]) == (14, 14)
    assert plan["fingerprint"][:8] in plan["folder"]
    assert plan["teacher_features"] == dict.fromkeys(plan["stages"], "ahead")
    assert plan["computed_in_full"] == []
    assert not (tmp_path / "runs").exists()


def test_dry_run_warns_of_an_average_that_never_averages(file: Path, zscl: Callable[..., Command]) -> None:
    found = json.loads(zscl("run", file, "--dry-run", "--json", "--set", "method=we").out)
    assert len(found["plan"]["warnings"]) == 3
    assert "method.average.every is 100, but stage 'first' has 5 steps" in found["plan"]["warnings"][0]


def test_dry_run_refuses_the_folder_of_another_run(file: Path, tmp_path: Path, zscl: Callable[..., Command]) -> None:
    row = {"fingerprint": "0" * 16, "algorithm": algorithm_version(), "accuracy": {}, "images": {}, "seconds": 0.0}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/zero_shot.json").write_text(json.dumps(row))
    found = zscl("run", file, "--dry-run", "--out", tmp_path / "other")
    assert found.code == 2
    assert "found a run of another experiment" in found.error
    changes = ["seed=3", "optimisation.steps=7", "method=we", "compute.workers=1"]
    recipes.write_experiment(recipes.load_experiment(file, changes), tmp_path / "other/experiment.yaml")
    found = zscl("run", file, "--dry-run", "--out", tmp_path / "other", "--set", "seed=4")
    assert "; choose another folder (method." in found.error
    assert "optimisation.steps 7 there, 5 here; seed 3 there, 4 here)" in found.error  # all of them
    alike = ["name=another", "compute.workers=1"]
    recipes.write_experiment(recipes.load_experiment(file, alike), tmp_path / "other/experiment.yaml")
    found = zscl("run", file, "--dry-run", "--out", tmp_path / "other")
    assert "(the recipes are equal: the data, the model or a custom loss's code differs)" in found.error


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda file: file.stem)
def test_the_json_schema_accepts_every_shipped_recipe(shipped: Path, zscl: Callable[..., Command]) -> None:
    schema, content = json.loads(zscl("schema").out), recipes.read_recipe(shipped)
    if "search" in content:
        jsonschema.validate(content["search"], json.loads(zscl("schema", "--search").out))
        return
    if "corpus" in content or "variants" in content:
        pytest.skip("no recipe of a single experiment")
    jsonschema.validate(content, schema)
    jsonschema.validate(content | {"method": "zscl*", "reference": {"images": ["a", "b"]}}, schema)
    for wrong in ({"method": "zcl"}, {"sed": 1}, {"tasks": {}}, {"model": {"nam": "x"}}, {"seed": "1"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(content | wrong, schema)


@pytest.fixture
def table(tmp_path: Path, file: Path) -> Path:
    table = tmp_path / "table.yaml"
    table.write_text(
        f"base: {file.name}\nvariants:\n"
        "  plain: {method: finetune}\n  short: {tasks.0.steps: 3, seed: 7}\n  as-it-is:\n"
    )
    return table


def test_a_table_varies_its_base_row_by_row(table: Path, file: Path) -> None:
    found = load_variants(table, ["optimisation.steps=4"], ALL_VARIANTS)
    assert list(found) == ["plain", "short", "as-it-is"]
    assert [experiment.name for experiment in found.values()] == ["table-plain", "table-short", "table-as-it-is"]
    assert found["plain"].method.name == "finetune"
    assert (found["short"].tasks[0].steps, found["short"].seed) == (3, 7)
    assert {experiment.optimisation.steps for experiment in found.values()} == {4}
    assert found["as-it-is"].model_copy(update={"name": "mine"}) == recipes.load_experiment(
        file, ["optimisation.steps=4"]
    )
    assert load_variants(table, variant="short").keys() == {"short"}


@pytest.mark.parametrize(("variant", "code"), [(None, ErrorCode.MISSING_VALUE), ("lnog", ErrorCode.UNKNOWN_NAME)])
def test_a_table_requires_the_name_of_a_row(table: Path, variant: str | None, code: ErrorCode) -> None:
    with refused(code, "--variant") as error:
        load_variants(table, variant=variant)
    assert "expected --variant plain, short, as-it-is or all" in str(error.value)


def test_a_table_is_not_a_single_experiment(table: Path) -> None:
    with refused(ErrorCode.UNSUPPORTED, "variants"):
        recipes.load_experiment(table)


@pytest.mark.parametrize(
    ("content", "code", "field", "message"),
    [
        (
            {"base": "mine.yaml", "variants": {"a": {"tasks.9.steps": 3}}},
            ErrorCode.UNKNOWN_NAME,
            "tasks.9",
            "variants.a: tasks.9: found position '9'",
        ),
        ({"base": "mine.yaml", "variants": {"a": "finetune"}}, ErrorCode.INVALID_VALUE, "variants.a", "'finetune'"),
        (
            {"base": "mine.yaml", "variants": {"a": {"metod": "we"}}},
            ErrorCode.UNKNOWN_NAME,
            "metod",
            "unknown field 'metod'; did you mean 'method'?",
        ),
        ({"base": "nowhere.yaml", "variants": {"a": {}}}, ErrorCode.NOT_FOUND, "base", "nowhere.yaml"),
        ({"variants": {"a": {}}}, ErrorCode.INVALID_VALUE, "variants", "found the fields variants"),
        ({"base": "mine.yaml", "variants": {}}, ErrorCode.EMPTY, "variants", "found no variant"),
    ],
)
def test_a_wrong_table_is_refused(
    table: Path, content: dict[str, Any], code: ErrorCode, field: str, message: str
) -> None:
    YAML(typ="safe").dump(content, table)
    with refused(code, field) as error:
        load_variants(table, variant="a")
    assert message in str(error.value)


def test_a_recipe_without_rows_has_no_variants(file: Path) -> None:
    with refused(ErrorCode.UNSUPPORTED, "--variant"):
        load_variants(file, variant="a")


def test_dry_run_refuses_a_saving_that_the_model_does_not_support(file: Path, zscl: Callable[..., Command]) -> None:
    found = zscl("run", file, "--dry-run", "--set", "model=embedded", "--set", "compute.savings.pooled_row=always")
    assert found.code == 2
    assert "compute.savings.pooled_row=always is not possible with the model's image tower" in found.error


def test_dry_run_counts_distilled_images_without_a_reference_set(file: Path, zscl: Callable[..., Command]) -> None:
    found = zscl("run", file, "--dry-run", "--json", "--set", "method=lwf", "--set", "reference=null")
    plan = json.loads(found.out)["plan"]
    assert plan["images_through_student"] == 15 * (6 + 5)
    assert plan["teacher_features"] == dict.fromkeys(plan["stages"], "never")


def test_folders_of_variants(table: Path, tmp_path: Path, zscl: Callable[..., Command]) -> None:
    for variant, folders in {"short": ["out"], "all": ["out/plain", "out/short", "out/as-it-is"]}.items():
        content = json.loads(
            zscl("run", table, "--dry-run", "--json", "--variant", variant, "--out", tmp_path / "out").out
        )
        plans = content.get("variants", [content])
        assert [each["plan"]["folder"] for each in plans] == [str(tmp_path / folder) for folder in folders]


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system [touch was-run]", "!!python/object/new:os.system [touch was-run]",
     "!!python/name:os.system ''", "!!python/module:os ''"],
)  # fmt: skip
@pytest.mark.parametrize("by_option", [False, True])
def test_yaml_tags_cannot_create_python_objects(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str, by_option: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    text = dump_yaml(recipe())
    file.write_text(text if by_option else f"{text}seed: {tag}\n")
    with refused(ErrorCode.UNREADABLE, "seed" if by_option else None) as error:
        recipes.load_experiment(file, [f"seed={tag}"] if by_option else [])
    assert "could not determine a constructor for the tag 'tag:yaml.org,2002:py" in str(error.value)
    assert not (tmp_path / "was-run").exists()


def bomb(begin: str, line: str) -> str:
    """Ten levels, each of ten times the one before it."""
    lines = [begin] + [line.format(of=level, ten=", ".join([f"*a{level - 1}"] * 10)) for level in range(1, 11)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb("a0: &a0 [x, x, x]", "a{of}: &a{of} [{ten}]"), "expands to more than 100000 values"),
        (bomb("a0: &a0 {{x: 1}}", "a{of}: &a{of} {{<<: [{ten}]}}"), "expands to more than 100000 values"),
        ("a: &a [*a]", "the value at line 1 contains itself"),
        ("[" * 500_000, "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("{a: " * 10_000, "nested too deep"),
        ("x: " + "9" * 10_000, "found no readable YAML"),
        ("x" * 2_000_000, "found more than 1000000 bytes"),
    ],
)
@pytest.mark.timeout(300)
def test_yaml_bombs_are_refused_quickly(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with refused(ErrorCode.UNREADABLE) as error:
        recipes.load_experiment(tmp_path / "recipe.yaml")
    assert message in str(error.value)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"model: embedded\ntasks [a]\nmethod: zscl\n",
            "line 2, column 1: could not find expected ':' while scanning a simple key",
        ),
        (b"seed: 0\ntasks: [a,\n  b\nmethod: zscl\n", "line 2, column 8: expected ',' or ']'"),
        (
            b"seed: 0\nmodel: 'embedded\nmethod: zscl\n",
            "line 2, column 8: found unexpected end of stream while scanning a quoted",
        ),
        (b"seed: 0\nmodel: a: b\n", "line 2, column 9: mapping values are not allowed here"),
        (b"seed: 0\nmodel: embedded\nseed: 1\n", 'line 3, column 1: found duplicate key "seed"'),
        (b"seed: 0\n# \xff\n", "line 2 has a byte that is not valid UTF-8"),
        (b"seed: 0\nmodel: \x07\n", "line 2 has a character that YAML does not allow"),
        (b'seed: 0\nmodel: "\\ud800"\n', "line 2 has an incomplete character"),
        (b"", "found nothing, expected fields such as"),
    ],
)
def test_errors_have_line_and_column(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text)
    with refused(ErrorCode.UNREADABLE if text else ErrorCode.EMPTY) as error:
        load_variants(tmp_path / "recipe.yaml")
    assert "recipe.yaml: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "To suppress" not in str(error.value)


def test_a_missing_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: nowhere.yaml\nvariants: {a: {seed: 1}}\n")
    with refused(ErrorCode.NOT_FOUND, "base") as error:
        load_variants(tmp_path / "recipe.yaml", variant="all")
    assert str(error.value).startswith(f"{tmp_path}/recipe.yaml: base: {tmp_path}/nowhere.yaml: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimisation: {learning_rate: 2,5}",
            "line 4, column 33: found the number 2,5, expected a decimal point, 2.5",
        ),
        (
            "optimisation: {steps: 1,000}",
            "line 4, column 25: found the number 1,000, expected a decimal point, 1.000, or",
        ),
        ("optimisation:\n  learning_rate: 2,5", "found '2,5', expected a decimal point: 2.5 (line 5, column 3)"),
        ("optimisation: {steps:2}", "line 4, column 16: found 'steps:2', expected a space after the colon"),
        (
            "optimisation:\n  seed: 2\n   steps: 1",
            "line 6, column 9: mapping values are not allowed here; expected a space",
        ),
        ("optimisation:\n  steps: 2\n seed: 1", "the same indentation for all fields of a section"),
        (
            "optimisation:\nsteps: 2",
            "did you mean 'optimisation.steps'? Then indent it below 'optimisation:' (line 5, col",
        ),
        ("optimisation:\n\tsteps: 2", "line 5, column 1: found character '\\t' that cannot start any token while"),
        ("optimisation:\n\tsteps: 2", "expected spaces, because YAML does not allow tabs"),
        (
            "optimisation:\n\u00a0\u00a0steps: 2",
            "line 5, column 1: found the character U+00A0, which looks like a space",
        ),
        *(
            (text, f"column {column}: found the character U+{ord(sign):04X}, which looks like a space")
            for sign in "\u00a0\u2003\u3000"
            for text, column in (
                (f"seed:{sign}2", 6),
                (f"seed: {sign}2", 7),
                (f"compute: {{device:{sign}cpu}}", 18),
                (f"optimisation:\n  steps:{sign}2", 9),
                (f"optimisation:\n  steps:{sign}2\n  batch_size: 2 # a: b", 9),
                (f"{sign}seed: 1", 1),
                (f"compute:\n {sign}device: cpu", 2),
            )
        ),
        ("seed: 1\nseed: 2", "expected every field only once"),
        ("compute: {compile: yes}", "compute.compile: found 'yes', expected true or false (line 4, column 11)"),
        ("optimisation: {steps: 1e3}", "found 1000.0, expected a whole number: 1000 (line 4, column 16)"),
        ("name: 2024-01-01", "name: found 2024-01-01, expected a text: put it in quotes (line 4, column 1)"),
        ("name: a: b", "line 4, column 8: mapping values are not allowed here"),
        ("name: @home", "line 4, column 7: found character '@' that cannot start any token"),
        ("name: %x", "expected quotes around a value that begins with this character"),
        ("reference: *.tar", "expected quotes around a value that begins with *"),
        ("reference: !tar", "expected quotes around a value that begins with !"),
        ("reference: [a, b", "a closing ]"),
        ("reference: {0..9}.tar", "quotes around a value that begins with [ or {"),
        ("compute: {device: cpu", "line 4, column 10: expected ',' or '}'"),
        ("name: 'x" + "y" * 500, "expected a closing quote"),
        ('reference: "C:\\photos"', "expected single quotes around a text with backslashes"),
        ("---\nseed: 1", "expected one document, without the line ---"),
    ],
)
def test_yaml_mistakes_are_reported_with_position_and_advice(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: embedded\ntasks: [a]\nmethod: finetune\n{text}\n")
    with pytest.raises(InputError) as error:  # the code differs from case to case
        recipes.load_experiment(tmp_path / "recipe.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("own", "own"), ("my recipe (2)", "my-recipe-2"), ("übung [1]", "ubung-1"), ("日本", "recipe"),
        ("a%20b?c#d", "a-20b-c-d"), ("-x", "x"), ("n" * 240, "n" * 100),
    ],
)  # fmt: skip
def test_every_file_name_gives_a_valid_name(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / f"{file}.yaml").write_text("model: embedded\ntasks: [a]\nmethod: finetune\n")
    assert recipes.load_experiment(tmp_path / f"{file}.yaml").name == name


@pytest.mark.parametrize("name", ["a/b", "a b", "..", "[x]", "ü"])
def test_a_variants_name_must_be_a_valid_folder_name(table: Path, name: str) -> None:
    table.write_text(dump_yaml({"base": "tiny.yaml", "variants": {name: {"seed": 1}}}))
    with refused(ErrorCode.INVALID_VALUE, "variants") as error:
        load_variants(table, (), "all")
    assert repr(name) in str(error.value)


def test_long_file_names_are_shortened_before_the_suffix(table: Path) -> None:
    long = table.rename(table.with_name(f"{'x' * 120}.yaml"))
    names = [experiment.name for experiment in load_variants(long, variant=ALL_VARIANTS).values()]
    assert names == [f"{'x' * 94}-plain", f"{'x' * 94}-short", f"{'x' * 91}-as-it-is"]


def test_long_names_are_refused_with_their_field(file: Path) -> None:
    for field in ("name", "method.name"):
        with refused(ErrorCode.INVALID_VALUE, field):
            recipes.load_experiment(file, [f"{field}={'n' * 101}"])


def test_differences_of_long_values_are_shortened_around_the_difference() -> None:
    long = [f"/data/a long name of a folder/task-{number}" for number in range(5)]
    found = preflight.diff_recipes(
        {"tasks": long, "a": {"b": "x" * 200 + "y"}}, {"tasks": [*long[:4], "/z"], "a": {"b": "x" * 201}}
    )
    assert found["tasks.4"] == ('"/data/a long name of a folder/task-4"', '"/z"')
    was, now = found["a.b"]
    assert (was, now) == (f'…{"x" * 20}y"', f'…{"x" * 21}"')
    assert preflight.diff_recipes({"tasks": ["a"]}, {"tasks": ["a", "b"]}) == {"tasks.1": ("nothing", '"b"')}


def test_numbers_in_quotes_are_reported(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe(optimisation={"batch_size": "16", "learning_rate": "1e-5"})))
    with refused(ErrorCode.INVALID_VALUE) as error:
        recipes.load_experiment(tmp_path / "recipe.yaml")
    assert "optimisation.batch_size: found '16' in quotes, expected a number without quotes" in str(error.value)
    assert "optimisation.learning_rate: found '1e-5' in quotes" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "# a comment:\u00a0here\n",
        "seed: 1  # so:\u00a0\u3000that\n",
        "\u0023\u00a0a comment\n",
        "name: 'a:\u00a0b'\n",
        'name: "\u3000a:\u00a0b"\n',
        "name: a photo:\u00a0of\u00a0it\n",
        "name: |\n  a:\u00a0b\n  \u00a0c\n",
        "reference: 'photos/\u00a0a'\n",
        "name: 'two\n\n  \u00a0lines'\n",
    ],
)
def test_odd_spaces_in_texts_and_comments_are_accepted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: embedded\n" + text, encoding="utf-8")
    assert recipes.read_recipe(file)["model"] == "embedded"


def test_an_odd_space_in_a_comment_does_not_hide_another_error(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("# a:\u00a0b\nname: 'x:\u00a0y'\ntasks: [a\n", encoding="utf-8")
    with refused(ErrorCode.UNREADABLE) as error:
        recipes.read_recipe(file)
    assert "line 3, column 8: expected ',' or ']'" in str(error.value)
