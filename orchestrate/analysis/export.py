"""Export of a stage's model for the Hugging Face hub (`zscl export`): an open_clip folder with a model card."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from orchestrate.recipes.recipe import load_experiment
from orchestrate.reports.charts import draw_accuracies, draw_matrix
from orchestrate.reports.results import (
    build_matrix_columns,
    format_cell,
    format_markdown_table,
    format_method_changes,
    format_percent,
    load_result,
)
from schemas.errors import ErrorCode, InputError
from schemas.experiment import Experiment
from schemas.redaction import mask
from schemas.results import Result
from zscl.models.clip import CONFIG
from zscl.runtime.atomic_io import atomic_folder
from zscl.sequence.layout import EXPERIMENT, model_folder

CARD = """---
{{ card_data }}
---

# {{ title }}

A CLIP, fine-tuned on {{ trained | length }} task{{ '' if trained | length == 1 else 's' }} one after another
({{ trained | join(', ') }}) by **{{ method }}**. The method's family: [ZSCL]({{ paper }}), ICCV 2023.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")  # or "hf-hub:OWNER/NAME"
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
```

## Accuracy

Top-1 accuracy on each task's {{ judged_on }} images among that task's classes, in per cent, after each stage.
The row of this model is **{{ row }}**.

{{ matrix }}

![Accuracy matrix](accuracy_matrix.png)

![Accuracy of each task after each stage](accuracy_by_stage.png)

{{ figures }}

## Training

- Method: {{ method }}{% if changes %}, with {{ changes }}{% endif %}
- Initial model: `{{ model }}`
- Seed {{ seed }}; {{ steps }} steps a stage; images a step: {{ batch }}{% if reference %} + {{ reference }}{% endif %}
- Fingerprint of the experiment: `{{ fingerprint }}`
- Trained on {{ workers }} worker{{ '' if workers == 1 else 's' }} ({{ device }}) with {{ versions }}

| task | content (SHA-256) | split family | test images |
|---|---|---|---:|
{{ data }}

The full recipe, including all defaults, is `experiment.yaml` in this folder.
{% if warnings %}
## Warnings

{{ warnings }}
{% endif %}
"""
PAPER = "https://arxiv.org/abs/2303.06628"


def export_model(run: Path, stage: int | None, out: Path) -> Path:
    """Write the model of a stage, the recipe and a model card to a new folder.

    Args:
        run: Folder of a finished run.
        stage: Number of the stage, from 1; default: the last stage.
        out: Output folder. It must be empty or must not exist.

    Returns:
        The output folder.

    Raises:
        InputError: The run or the stage does not exist, the stage's weights were deleted, or `out` is not empty.
    """
    result = load_result(run)
    stages = len(result.stages)
    number = stages if stage is None else stage
    if not 1 <= number <= stages:
        expected = f"1 to {stages}" if stages else "a run that trained a stage"
        raise InputError(
            f"--stage {number}: found a run of {stages} stages in {run}, expected {expected}",
            code=ErrorCode.UNKNOWN_NAME,
            field="--stage",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out}: found a file or a folder that is not empty, expected a new or an empty folder",
            code=ErrorCode.CONFLICT,
            field="--out",
        )
    model = model_folder(run, number, result.tasks[number - 1].name)
    if not (model / CONFIG).is_file():
        raise InputError(
            f"{model}: found no model, expected the weights of stage {number} (see compute.keep_models)",
            code=ErrorCode.NOT_FOUND,
        )
    experiment = load_experiment(run / EXPERIMENT)
    with atomic_folder(out) as temporary:
        shutil.copytree(model, temporary, dirs_exist_ok=True)
        shutil.copy(run / EXPERIMENT, temporary)
        (temporary / "README.md").write_text(str(_card(result, experiment, number)), encoding="utf-8")
        for name, figure in (("matrix", draw_matrix(result)), ("by_stage", draw_accuracies(result))):
            figure.savefig(temporary / f"accuracy_{name}.png", dpi=120)
    return out


def _card(result: Result, experiment: Experiment, stage: int) -> ModelCard:
    """Build the model card: method, accuracy matrix, metrics, data and warnings."""
    tasks = [task.name for task in result.tasks]
    figures = "  ".join(
        f"{name} {format_percent(value)}" for name, value in result.metrics.model_dump().items() if value is not None
    )
    optimisation = experiment.optimisation
    card_data = ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "continual-learning", "zscl"],
    )
    card: ModelCard = ModelCard.from_template(
        card_data,
        template_str=CARD,
        title=f"{experiment.name}, {result.method}, after {tasks[stage - 1]}",
        trained=tasks[:stage],
        row=f"{stage}-{tasks[stage - 1]}",
        method=result.method,
        changes=format_method_changes(result),
        paper=PAPER,
        judged_on="held-out training" if _uses_held_out(result) else "test",
        matrix=_matrix(result),
        figures=f"Over the whole sequence of {len(result.stages)} stages: {figures} (per cent).",
        model=mask(experiment.model.name),
        seed=result.seed,
        steps=optimisation.steps,
        batch=optimisation.batch_size,
        reference=optimisation.reference_batch_size if experiment.method.distill else None,
        fingerprint=result.fingerprint,
        workers=result.workers,
        device=result.device,
        versions=", ".join(f"{library} {version}" for library, version in result.versions.items()),
        data="\n".join(
            f"| {task.name} | `{task.digest[:16]}` | {task.split_family or 'unknown'} | {task.test_images} |"
            for task in result.tasks
        ),
        warnings="\n".join(f"- {warning}" for warning in result.warnings),
    )
    return card


def _uses_held_out(result: Result) -> bool:
    return result.held_out is not None and result.held_out.judged_on == "held_out"


def _matrix(result: Result) -> str:
    """Format the accuracy matrix as Markdown."""
    columns = build_matrix_columns(result)
    rows = [[format_cell(cell) for cell in row] for row in zip(*columns.values(), strict=True)]
    return format_markdown_table([list(columns), *rows], text_columns=1)
