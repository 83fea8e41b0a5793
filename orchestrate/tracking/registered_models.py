"""Logging of the stages' models in MLflow, so that `mlflow.pyfunc.load_model` can load them."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.type_hints import AnyType

CODE = Path(__file__).with_name("pyfunc_model.py")
REQUIREMENTS = ("open_clip_torch", "torch", "torchvision", "pandas", "pillow")
READY = "READY"
ClassPrompts = tuple[Sequence[str], Sequence[str]]  # class names, prompt templates
# MLflow recommends an input example with every model. For these models, it would be an image.
warnings.filterwarnings("ignore", message=".*input example was not provided")


def log_model(
    client: MlflowClient,
    experiment_id: str,
    run_id: str,
    name: str,
    folder: Path,
    load_prompts: Callable[[], ClassPrompts],
) -> None:
    """Log a stage's model in MLflow, unless MLflow already has the model.

    Args:
        client: The store.
        experiment_id: ID of the run's MLflow experiment.
        run_id: ID of the stage's MLflow run.
        name: Name of the logged model.
        folder: The model's folder, in the format of open_clip's `local-dir:`.
        load_prompts: Function that loads the model's default class names and templates. It is only called if MLflow
            does not have the model yet.
    """
    query = f"name = '{name}' AND source_run_id = '{run_id}'"
    models = list(client.search_logged_models([experiment_id], query, max_results=1))
    if models and str(models[0].status) == READY:
        return
    model = (
        models[0]
        if models
        else client.create_logged_model(experiment_id, name, run_id, model_type="zero-shot classifier")
    )
    with tempfile.TemporaryDirectory(prefix="zscl-model-") as scratch:
        path = Path(scratch, "model")
        save_model(path, folder, load_prompts(), model.model_id)
        client.log_model_artifacts(model.model_id, str(path))
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, READY)  # this is last, because a model that is ready is not sent again


def save_model(path: Path, model_folder: Path, prompts: ClassPrompts, model_id: str | None = None) -> None:
    """Save a stage's model in MLflow's format, with the flavours `python_function` and `open_clip`.

    Args:
        path: The folder to create.
        model_folder: The model's folder, in the format of open_clip's `local-dir:`.
        prompts: The default class names and templates.
        model_id: ID of the model in MLflow; `None` if the model is only saved to the folder.
    """
    classes, templates = map(list, prompts)
    params: list[Any] = [
        ParamSpec("classes", "string", default=classes, shape=(-1,)),
        ParamSpec("templates", "string", default=templates, shape=(-1,)),
    ]
    signature = ModelSignature(Schema([ColSpec(AnyType(), "image")]), params=ParamSchema(params))
    model = Model(model_id=model_id)
    model.add_flavor("open_clip", data="data", open_clip_version=version("open_clip_torch"))
    mlflow.pyfunc.save_model(
        path,
        loader_module=CODE.stem,
        data_path=str(model_folder),
        code_paths=[str(CODE)],
        mlflow_model=model,
        signature=signature,
        pip_requirements=[f"{library}=={version(library)}" for library in REQUIREMENTS],
    )
