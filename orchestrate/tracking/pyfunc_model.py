"""A stage's model for `mlflow.pyfunc.load_model`. It classifies images, given the names of the classes.

MLflow copies this file next to the weights, and imports it on the machine that loads the model. The file only needs the
packages in the model's requirements. It does not need zscl.
"""

import io
from pathlib import Path
from typing import Any

import open_clip
import pandas as pd
import torch
from PIL import Image

BATCH_SIZE = 64


class ZeroShotClassifier:
    """An open_clip model as a zero-shot classifier, on a GPU if there is one.

    Attributes:
        device: `cuda` or `cpu`.
        model: The open_clip model.
        transform: The image preprocessing.
        tokenizer: The tokenizer for the prompts (templates with class names).
    """

    def __init__(self, folder: str) -> None:
        name = f"local-dir:{folder}"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name, device=self.device)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        """Classify images.

        Args:
            model_input: A table with a column `image`: paths, or the bytes of image files.
            params: The class names `classes`, and the prompt templates `templates`, in which `{c}` stands for the class
                name. The text embeddings of a class's prompts are averaged. The defaults of both parameters
                are those of the task on which the stage trained.

        Returns:
            The probabilities, with one row per image and one column per class.
        """
        classes, templates = list(params["classes"]), list(params["templates"])
        formats = [lambda name, template=template: template.replace("{c}", name) for template in templates]
        images, rows = list(model_input["image"]), list[list[float]]()
        with torch.inference_mode():
            head = open_clip.build_zero_shot_classifier(
                self.model, self.tokenizer, classes, formats, device=self.device
            )
            for start in range(0, len(images), BATCH_SIZE):
                batch = torch.stack([self._read(image) for image in images[start : start + BATCH_SIZE]])
                features = self.model.encode_image(batch.to(self.device), normalize=True)
                rows += (self.model.logit_scale.exp() * features @ head).softmax(dim=1).float().cpu().tolist()
        return pd.DataFrame(rows, columns=classes)

    def _read(self, source: str | bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
            transformed: torch.Tensor = self.transform(image.convert("RGB"))
        return transformed


def _load_pyfunc(data_path: str) -> ZeroShotClassifier:
    """Load the model; MLflow calls this function."""
    return ZeroShotClassifier(data_path)
