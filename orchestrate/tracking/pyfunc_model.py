"""A stage's model as MLflow loads it: images and class names in, probabilities out.

MLflow copies this file beside the weights and imports it where the model is loaded (`mlflow.pyfunc.load_model`), which
needs nothing of zscl, only what the model's own requirements name.
"""

import io
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import torch
from PIL import Image

AT_ONCE = 64  # images


class ZeroShotClassifier:
    """An open_clip model that tells classes apart by their names; on a GPU where there is one."""

    def __init__(self, folder: str) -> None:
        name = f"local-dir:{folder}"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name, device=self.device)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        """Each image's probabilities over the classes.

        Args:
            model_input: a table with a column `image`: paths, or the bytes of files.
            params: `classes`: names; `templates`: prompts with `{c}` for the name, averaged into a class embedding.
                Default: those of the task that the stage trained.

        Returns a table with a row an image and a column a class.
        """
        classes, templates = list(params["classes"]), list(params["templates"])
        formats = [lambda name, template=template: template.replace("{c}", name) for template in templates]
        images, rows = list(model_input["image"]), list[list[float]]()
        with torch.inference_mode():
            head = open_clip.build_zero_shot_classifier(
                self.model, self.tokenizer, classes, formats, device=self.device
            )
            for start in range(0, len(images), AT_ONCE):
                batch = torch.stack([self._read(image) for image in images[start : start + AT_ONCE]])
                features = self.model.encode_image(batch.to(self.device), normalize=True)
                rows += (self.model.logit_scale.exp() * features @ head).softmax(dim=1).float().cpu().tolist()
        return pd.DataFrame(rows, columns=classes)

    def _read(self, image: str | bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else Path(image)) as opened:
            transformed: torch.Tensor = self.transform(opened.convert("RGB"))
        return transformed


def _load_pyfunc(data_path: str) -> ZeroShotClassifier:
    """What MLflow calls."""
    return ZeroShotClassifier(data_path)
