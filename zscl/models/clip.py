"""Loading and saving of open_clip models, and their precision and determinism.

A saved model is a folder that open_clip loads with the name `local-dir:FOLDER`.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from schemas.errors import ErrorCode, InputError
from schemas.experiment import LOCAL_MODEL, Model
from zscl.models.load_checks import (
    HUB_MODEL,
    check_features,
    check_name,
    check_packages,
    check_weights_reachable,
    describe_differences,
    describe_mismatch,
)
from zscl.runtime.atomic_io import atomic_folder
from zscl.runtime.hashing import sha256_of, sha256_of_file
from zscl.runtime.paths import did_you_mean_path
from zscl.runtime.retry import retry_io, to_os_error

EMBEDDED_MODEL = Path(__file__).parent / "embedded_model"
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
WEIGHTS_ONLY, NOT_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its tokenizer and its image transforms.

    Attributes:
        model: open_clip's model.
        tokenizer: Converts n texts to token ids, [n, L].
        train_transform: Converts an image to a tensor, [3, H, W], with random augmentation.
        evaluation_transform: Converts an image to a tensor, [3, H, W], without random augmentation.
        config: open_clip's model configuration.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    train_transform: Callable[[Any], torch.Tensor]
    evaluation_transform: Callable[[Any], torch.Tensor]
    config: dict[str, Any]

    def save(self, model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a model of this architecture as an open_clip folder. The write is atomic.

        Args:
            model: The model whose weights are written.
            folder: The folder to create.
            dtype: The type of the written weights.

        Raises:
            OSError: The folder cannot be written, for example because the disk is full.
        """
        with atomic_folder(folder) as temporary:
            weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
            try:
                save_file(weights, temporary / WEIGHTS)
            except SafetensorError as error:  # also raised for a full disk
                os_error = to_os_error(error)
                raise os_error from error
            (temporary / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
            save_config_for_hf(self.model, temporary / CONFIG, model_config=self.config)
            if hasattr(self.tokenizer, "save_pretrained"):
                self.tokenizer.save_pretrained(temporary)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load an open_clip folder's weights into a model of the same architecture.

    Args:
        model: The model, changed in place.
        folder: The open_clip folder.

    Raises:
        InputError: The weights are damaged, or belong to another architecture.
    """
    file = folder / WEIGHTS
    try:
        weights = retry_io(lambda: load_file(file), must_exist=folder.parent, description=file)
    except Exception as error:  # safetensors raises exceptions of many kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"{file}: found no readable weights of a model ({reason})", code=ErrorCode.UNREADABLE
        ) from error
    if wrong := describe_differences(model, weights):
        raise InputError(
            f"{file}: found weights of another architecture, expected those of the model ({wrong})",
            code=ErrorCode.MISMATCH,
        )
    model.load_state_dict(weights)


def open_clip_name(model: Model) -> str:
    """Return the name under which open_clip loads a recipe's model."""
    if model.name == "embedded":
        return f"{LOCAL_MODEL}{EMBEDDED_MODEL}"
    return model.name if model.name.startswith((LOCAL_MODEL, HUB_MODEL)) else model.name.replace("/", "-")


def load_clip(model: Model, device: torch.device | str = "cpu") -> Clip:
    """Load a model with float32 weights, its tokenizer and its image transforms.

    Code in the model's files is never run. To check the features, two images and two texts are encoded. Loading onto a
    GPU disables TF32 for convolutions in the whole process.

    Args:
        model: The recipe's model.
        device: The device of the model.

    Returns:
        The model, in training mode, with its tokenizer and transforms.

    Raises:
        InputError: open_clip does not know the model, its weights are missing, unreadable or of another architecture,
            or its features are not finite and of shape [n, D].
        OutOfMemoryError: The device has too little memory for the model.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    name = open_clip_name(model)
    description = f"model: '{model.name}'" + (f" with pretrained '{model.pretrained}'" if model.pretrained else "")
    if name.startswith(LOCAL_MODEL) and not (Path(name.removeprefix(LOCAL_MODEL)) / WEIGHTS).is_file():
        _check_safetensors(Path(name.removeprefix(LOCAL_MODEL)), description)
    check_name(model, description)
    try:
        check_weights_reachable(model, description)
        check_packages(open_clip.get_model_config(name), name, description)
        with warnings.catch_warnings(), _weights_only_loading():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            network, train_transform, evaluation_transform = _create_model(name, model, device, description)
        config = open_clip.get_model_config(name)
        _check_no_remote_code(config)
        tokenizer = open_clip.get_tokenizer(name)
    except (InputError, torch.OutOfMemoryError):
        raise
    except UserWarning as error:
        raise InputError(
            f"{description} has the wrong activation, expected '{model.name}-quickgelu' ({error})",
            code=ErrorCode.MISMATCH,
            field="model.name",
        ) from error
    except Exception as error:  # open_clip raises exceptions of many kinds if it cannot read a model
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{description} cannot be loaded, expected an open_clip model ({reason})",
            code=ErrorCode.UNREADABLE,
            field="model",
        ) from error
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise InputError(
            f"{description} normalises over the batch (BatchNorm), expected a model whose features do not depend on "
            "which images share a batch or a worker (any ViT)",
            code=ErrorCode.UNSUPPORTED,
            field="model",
        )
    check_features(network, tokenizer, evaluation_transform, description, device)
    return Clip(network, tokenizer, train_transform, evaluation_transform, config)


def _create_model(name: str, model: Model, device: torch.device | str, description: str) -> tuple[nn.Module, Any, Any]:
    """Create a model, load its weights, and return the model and its transforms for training and evaluation."""
    if name.startswith(HUB_MODEL):  # this call reports why there are no weights; create_model does not
        open_clip.pretrained.download_pretrained_from_hf(name.removeprefix(HUB_MODEL))
    try:
        network, train_transform, evaluation_transform = open_clip.create_model_and_transforms(
            name, pretrained=model.pretrained, device=device, output_dict=True, require_pretrained=True
        )
    except (RuntimeError, AssertionError, KeyError, AttributeError) as error:  # includes weights that do not fit
        folder = Path(name.removeprefix(LOCAL_MODEL))
        file = folder / WEIGHTS if name.startswith(LOCAL_MODEL) else Path(model.pretrained or "")
        if not file.is_file() or not (wrong := describe_mismatch(name, file)):
            raise
        raise InputError(
            f"{description}: found weights of another architecture in {file}, expected those of "
            f"{folder / CONFIG if name.startswith(LOCAL_MODEL) else name} ({wrong})",
            code=ErrorCode.MISMATCH,
            field="model",
        ) from error
    return network, train_transform, evaluation_transform


def _check_safetensors(folder: Path, description: str) -> None:
    """Refuse a folder whose weights are not in safetensors files."""
    if not folder.is_dir():
        raise InputError(
            f"{description}: found no such folder, expected an open_clip folder{did_you_mean_path(folder)}",
            code=ErrorCode.NOT_FOUND,
            field="model",
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{description}: found no .safetensors file in the folder, expected {CONFIG} and {WEIGHTS}",
            code=ErrorCode.NOT_FOUND,
            field="model",
        )
    pickled = sorted(file.name for pattern in ("*.bin", "*.pth") for file in folder.glob(pattern))
    if pickled and not (folder / WEIGHTS).is_file():  # open_clip might load the pickle
        raise InputError(
            f"{description}: found {pickled[0]}, but no {WEIGHTS}, expected the weights in {WEIGHTS}",
            code=ErrorCode.UNSUPPORTED,
            field="model",
        )


@contextmanager
def _weights_only_loading() -> Iterator[None]:
    """Make every `torch.load` of the process read only tensors, regardless of arguments and environment variables.

    open_clip passes `weights_only=True`, but retries some failed calls without it.
    """
    before = {name: os.environ.pop(name, None) for name in (WEIGHTS_ONLY, NOT_WEIGHTS_ONLY)}
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_no_remote_code(config: Any) -> None:
    """Refuse a model whose tokenizer would run code from the model's files."""
    if "trust_remote_code" in config.get("text_cfg", {}).get("tokenizer_kwargs", {}):
        raise ValueError("its configuration sets trust_remote_code, which would run code from the model's files")


def weights_digest(model: Model) -> str:
    """Return a digest that identifies the content of a model.

    Args:
        model: The recipe's model.

    Returns:
        For a local folder, a hash of weights and configuration. For any other model, open_clip's name of the model,
        followed by the hash of the local weights file or the tag of the pretrained weights.

    Raises:
        InputError: The model's files are missing or cannot be read.
    """
    try:
        return _content_digest(model)
    except OSError as error:  # an invalid file name, or missing permissions
        raise InputError(
            f"model: '{model.name}' cannot be loaded, expected readable files ({error})",
            code=ErrorCode.UNREADABLE,
            field="model",
        ) from error


def _content_digest(model: Model) -> str:
    name = open_clip_name(model)
    if not name.startswith(LOCAL_MODEL):
        weights = Path(model.pretrained or "")
        return f"{name} {sha256_of_file(weights) if weights.is_file() else model.pretrained}"
    folder = Path(name.removeprefix(LOCAL_MODEL))
    _check_safetensors(folder, f"model: '{model.name}'")
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"model: '{model.name}': found no {CONFIG} in the folder, expected an open_clip folder",
            code=ErrorCode.NOT_FOUND,
            field="model",
        )
    try:
        config = json.dumps(json.loads((folder / CONFIG).read_text()), sort_keys=True)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"model: '{model.name}' cannot be loaded, expected JSON in {CONFIG} ({error})",
            code=ErrorCode.UNREADABLE,
            field="model",
        ) from error
    return sha256_of(config, *(sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))))


def image_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width, in pixels, of the image tower's input."""
    visual: Any = model.visual
    height, width = open_clip.utils.to_2tuple(visual.image_size)
    return height, width


def freeze(model: nn.Module) -> nn.Module:
    """Put a model into evaluation mode and disable its gradients, in place."""
    return model.eval().requires_grad_(False)


def at_least_float32(features: torch.Tensor) -> torch.Tensor:
    """Convert features of lower precision than float32, such as autocast's, to float32. Keep float64 unchanged."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def use_deterministic_kernels(device: torch.device, enabled: bool = True) -> None:
    """Make training on a GPU bit-reproducible. The settings apply to the whole process.

    By default, the backward passes of attention and indexing sum numbers in an order that differs between runs.
    Training on a CPU is reproducible without these settings.

    Args:
        device: The device on which the process trains.
        enabled: The recipe's `compute.deterministic`.
    """
    if device.type == "cuda" and enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the process first uses cuBLAS
        torch.use_deterministic_algorithms(True)  # with `warn_only`, attention stays nondeterministic
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_no_deterministic_kernel(error: RuntimeError) -> bool:
    """Return whether torch raised `error` for an operation without a deterministic implementation on the device."""
    return "does not have a deterministic implementation" in str(error)


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return an autocast context for `bf16`, and a no-op context for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
