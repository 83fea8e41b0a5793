"""A stage's model as MLflow loads it: images and class names in, probabilities out.

MLflow copies this file beside the weights and runs it where the model is loaded (`mlflow.pyfunc.load_model`), which
needs nothing of zscl, only what the model's own requirements name.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

AT_ONCE = 64  # images


class ZeroShotClassifier(PythonModel):  # type: ignore[misc]
    """An open_clip model that tells classes apart by their names."""

    def load_context(self, context: Any) -> None:
        """Load the weights, on a GPU where there is one."""
        import open_clip
        import torch

        name = f"local-dir:{context.artifacts['open_clip']}"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name, device=self.device)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    # MLflow takes a type of `model_input` for a schema, and has none for "paths or bytes".
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Each image's probabilities over the classes.

        Args:
            context: MLflow's.
            model_input: images, as paths or as the bytes of files: a table with a column `image`, or a list.
            params: `classes`: names; `templates`: prompts with `{c}` for the name, averaged into a class embedding.
                Default: those of the task that the stage trained.

        Returns a table with a row an image and a column a class.
        """
        import open_clip
        import torch
        from PIL import Image

        given = params or {}
        classes, templates = list(given["classes"]), list(given["templates"])
        images = list(model_input["image"] if isinstance(model_input, pd.DataFrame) else model_input)
        formats = [lambda name, template=template: template.replace("{c}", name) for template in templates]
        rows: list[list[float]] = []
        with torch.inference_mode():
            head = open_clip.build_zero_shot_classifier(
                self.model, self.tokenizer, classes, formats, device=self.device
            )
            for start in range(0, len(images), AT_ONCE):
                batch = []
                for image in images[start : start + AT_ONCE]:
                    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else Path(image)) as opened:
                        batch.append(self.transform(opened.convert("RGB")))
                features = self.model.encode_image(torch.stack(batch).to(self.device), normalize=True)
                rows += _list((self.model.logit_scale.exp() * features @ head).softmax(dim=1))
        return pd.DataFrame(rows, columns=classes)


def _list(rows: Any) -> Iterable[list[float]]:
    return rows.float().cpu().tolist()  # type: ignore[no-any-return]


set_model(ZeroShotClassifier())
