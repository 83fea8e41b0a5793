"""Each stage's model among MLflow's models: loaded by `mlflow.pyfunc.load_model`, registered like any other."""

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
Words = tuple[Sequence[str], Sequence[str]]  # class names, templates
# MLflow would like one with every model; ours would be a picture.
warnings.filterwarnings("ignore", message=".*input example was not provided")


def log_model(
    client: MlflowClient, experiment: str, run: str, name: str, folder: Path, words: Callable[[], Words]
) -> None:
    """Log an open_clip folder as the model of a stage's run, unless it is there.

    Args:
        client: of the store.
        experiment: the run's.
        run: the stage's.
        name: of the model.
        folder: the model's, as open_clip's `local-dir:` reads it.
        words: finds the class names and templates that the model takes where it is given none; not called in vain.
    """
    query = f"name = '{name}' AND source_run_id = '{run}'"
    found = list(client.search_logged_models([experiment], query, max_results=1))
    if found and str(found[0].status) == READY:
        return
    made = found[0] if found else client.create_logged_model(experiment, name, run, model_type="zero-shot classifier")
    with tempfile.TemporaryDirectory(prefix="zscl-model-") as scratch:
        place = Path(scratch, "model")
        save(place, folder, words(), made.model_id)
        client.log_model_artifacts(made.model_id, str(place))
    client.log_outputs(run, [LoggedModelOutput(made.model_id, step=0)])
    client.finalize_logged_model(made.model_id, READY)  # last: what is ready is not sent again


def save(place: Path, folder: Path, words: Words, model_id: str | None = None) -> None:
    """Write an MLflow model with two flavours: `python_function`, and `open_clip`, which names the folder in it."""
    classes, templates = map(list, words)
    params: list[Any] = [
        ParamSpec("classes", "string", default=classes, shape=(-1,)),
        ParamSpec("templates", "string", default=templates, shape=(-1,)),
    ]
    signature = ModelSignature(Schema([ColSpec(AnyType(), "image")]), params=ParamSchema(params))
    model = Model(model_id=model_id)
    model.add_flavor("open_clip", data="data", open_clip_version=version("open_clip_torch"))
    mlflow.pyfunc.save_model(
        place,
        loader_module=CODE.stem,
        data_path=str(folder),
        code_paths=[str(CODE)],
        mlflow_model=model,
        signature=signature,
        pip_requirements=[f"{library}=={version(library)}" for library in REQUIREMENTS],
    )
