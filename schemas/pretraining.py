"""The recipe of `zscl.training.pretrain`: contrastive pre-training of a small CLIP on captioned images."""

from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from schemas.base import Location, Share, StrictModel, TupleOf


class Preprocess(StrictModel):
    """Image preprocessing of the model. The fields have the names and meanings of open_clip's settings."""

    mean: Annotated[tuple[float, float, float], Field(strict=False)]
    std: Annotated[tuple[float, float, float], Field(strict=False)]
    interpolation: str = Field("bicubic", pattern="^(bicubic|bilinear)$")
    resize_mode: str = Field("shortest", pattern="^(shortest|longest|squash)$")


class Pretraining(StrictModel):
    """Settings of contrastive pre-training.

    An image and a caption of the batch are a positive pair if the image's own caption equals it.
    """

    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="Default: the recipe's file name")
    architecture: dict[str, Any] = Field(description="open_clip model_cfg: embed_dim, vision_cfg, text_cfg")
    preprocess: Preprocess
    corpus: TupleOf[Location] = Field(min_length=1, description="Shards or folders of images with .txt captions")
    judge: TupleOf[Location] = Field(
        (), description="Task folders on which the zero-shot accuracy is measured at the end"
    )
    epochs: PositiveInt = 6
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Fraction of the steps that are warm-up")
    weight_decay: float = Field(
        0.1, ge=0, description="Weight decay of matrices; biases, norms and embeddings have none"
    )
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.98)
    gradient_norm: PositiveFloat = Field(1.0, description="Gradients are clipped to this norm")
    shift_pixels: NonNegativeInt = Field(2, description="Largest random shift of an image, in pixels")
    seed: int = Field(0, ge=0)
