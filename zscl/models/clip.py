"""open_clip in and out: a stage's result is a folder that open_clip's `local-dir:` loads."""

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

from schemas.errors import InputError
from schemas.experiment import LOCAL_MODEL, Model
from zscl.models.load_checks import (
    HUB_MODEL,
    check_features,
    describe_differences,
    describe_mismatch,
    check_packages,
    check_name,
    check_weights_reachable,
)
from zscl.runtime.atomic_io import atomic_folder
from zscl.runtime.hashing import sha256_of, sha256_of_file
from zscl.runtime.paths import did_you_mean_path
from zscl.runtime.retry import os_error_of, retry_io

EMBEDDED_MODEL = Path(__file__).parent / "embedded_model"
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
WEIGHTS_ONLY, NOT_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Clip:
    """A model with everything it needs to read images and texts."""

    model: nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    train_transform: Callable[[Any], torch.Tensor]
    evaluation_transform: Callable[[Any], torch.Tensor]
    config: dict[str, Any]

    def save(self, model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `model`, of this architecture, as an open_clip folder, whole or not at all."""
        with atomic_folder(folder) as temporary:
            weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}
            try:
                save_file(weights, temporary / WEIGHTS)
            except SafetensorError as error:  # of a full disk, too
                raise os_error_of(error) from error
            (temporary / WEIGHTS).chmod(0o644)  # safetensors writes for its owner alone; a run's folder is shared
            save_config_for_hf(self.model, temporary / CONFIG, model_config=self.config)
            if hasattr(self.tokenizer, "save_pretrained"):
                self.tokenizer.save_pretrained(temporary)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read an open_clip folder's weights into a model of its architecture.

    Raises:
        InputError: they are damaged, or another architecture's.
    """
    file = folder / WEIGHTS
    try:
        weights = retry_io(lambda: load_file(file), must_exist=folder.parent, what=file)
    except Exception as error:  # safetensors raises what it meets
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: found no readable weights, expected a model's ({reason})") from error
    if wrong := describe_differences(model, weights):
        raise InputError(f"{file}: found weights of another architecture, expected the model's own ({wrong})")
    model.load_state_dict(weights)


def open_clip_name(model: Model) -> str:
    """The name open_clip knows the model by."""
    if model.name == "embedded":
        return f"{LOCAL_MODEL}{EMBEDDED_MODEL}"
    return model.name if model.name.startswith((LOCAL_MODEL, HUB_MODEL)) else model.name.replace("/", "-")


def load_clip(model: Model, device: torch.device | str = "cpu") -> Clip:
    """Load a model, its tokenizer and its two image transforms, with float32 weights; nothing in its files is run.

    Two images and two texts are encoded, so that a model whose features are unusable is refused.

    On a GPU, the process computes float32 convolutions in float32 from then on, not in TF32 as torch does by default.

    Raises:
        InputError: open_clip knows no such model, its weights cannot be had, read or fitted, or its features are not
            finite and of shape [n, D].
    """
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    name = open_clip_name(model)
    shown = f"model: '{model.name}'" + (f" with pretrained '{model.pretrained}'" if model.pretrained else "")
    if name.startswith(LOCAL_MODEL) and not (Path(name.removeprefix(LOCAL_MODEL)) / WEIGHTS).is_file():
        _refuse_without_safetensors(Path(name.removeprefix(LOCAL_MODEL)), shown)
    check_name(model, shown)
    try:
        check_weights_reachable(model, shown)
        check_packages(open_clip.get_model_config(name), name, shown)
        with warnings.catch_warnings(), _weights_alone():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            network, train_transform, evaluation_transform = _created(name, model, device, shown)
        config = open_clip.get_model_config(name)
        _refuse_code(config)
        tokenizer = open_clip.get_tokenizer(name)
    except (InputError, torch.OutOfMemoryError):
        raise
    except UserWarning as error:
        raise InputError(f"{shown} has the wrong activation, expected '{model.name}-quickgelu' ({error})") from error
    except Exception as error:  # open_clip raises what its sources raise: any of them means an unreadable model
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{shown} cannot be loaded, expected an open_clip model ({reason})") from error
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        raise InputError(
            f"{shown} normalises over the batch (BatchNorm), expected a model whose features do not depend on "
            "which images share a batch or a worker (any ViT)"
        )
    check_features(network, tokenizer, evaluation_transform, shown, device)
    return Clip(network, tokenizer, train_transform, evaluation_transform, config)


def _created(name: str, model: Model, device: torch.device | str, shown: str) -> tuple[nn.Module, Any, Any]:
    """The model with its weights, and its two transforms."""
    if name.startswith(HUB_MODEL):  # create_model does not say why it has no weights
        open_clip.pretrained.download_pretrained_from_hf(name.removeprefix(HUB_MODEL))
    try:
        network, train_transform, evaluation_transform = open_clip.create_model_and_transforms(
            name, pretrained=model.pretrained, device=device, output_dict=True, require_pretrained=True
        )
    except (RuntimeError, AssertionError, KeyError, AttributeError) as error:  # of weights that do not fit, too
        folder = Path(name.removeprefix(LOCAL_MODEL))
        file = folder / WEIGHTS if name.startswith(LOCAL_MODEL) else Path(model.pretrained or "")
        if not file.is_file() or not (wrong := describe_mismatch(name, file)):
            raise
        raise InputError(
            f"{shown}: found weights of another architecture in {file}, expected those of "
            f"{folder / CONFIG if name.startswith(LOCAL_MODEL) else name} ({wrong})"
        ) from error
    return network, train_transform, evaluation_transform


def _refuse_without_safetensors(folder: Path, shown: str) -> None:
    if not folder.is_dir():
        raise InputError(f"{shown}: found no such folder, expected an open_clip folder{did_you_mean_path(folder)}")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{shown}: found no .safetensors in the folder, expected {CONFIG} and {WEIGHTS}")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pth") for file in folder.glob(pattern))
    if pickled and not (folder / WEIGHTS).is_file():  # open_clip may choose them instead
        raise InputError(f"{shown}: found {pickled[0]} beside weights of another name, expected them as {WEIGHTS}")


@contextmanager
def _weights_alone() -> Iterator[None]:
    """Let torch.load read nothing but tensors meanwhile, whoever calls it how, and whatever the user's variables say.

    open_clip asks for that itself, but asks again without it where its first call fails in one way.
    """
    before = {name: os.environ.pop(name, None) for name in (WEIGHTS_ONLY, NOT_WEIGHTS_ONLY)}
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[WEIGHTS_ONLY]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refuse_code(config: Any) -> None:
    """Refuse a model whose tokenizer would be run from the model's own files."""
    if "trust_remote_code" in config.get("text_cfg", {}).get("tokenizer_kwargs", {}):
        raise ValueError("its configuration asks to run code that comes with it: trust_remote_code")


def weights_digest(model: Model) -> str:
    """Identity of a model's content: the weights' hash where they are files here, else the name."""
    try:
        return _content_digest(model)
    except OSError as error:  # a name that no file can have, no permission
        raise InputError(f"model: '{model.name}' cannot be loaded, expected readable files ({error})") from error


def _content_digest(model: Model) -> str:
    name = open_clip_name(model)
    if not name.startswith(LOCAL_MODEL):
        weights = Path(model.pretrained or "")
        return f"{name} {sha256_of_file(weights) if weights.is_file() else model.pretrained}"
    folder = Path(name.removeprefix(LOCAL_MODEL))
    _refuse_without_safetensors(folder, f"model: '{model.name}'")
    if not (folder / CONFIG).is_file():
        raise InputError(f"model: '{model.name}': found no {CONFIG} in the folder, expected an open_clip folder")
    try:
        config = json.dumps(json.loads((folder / CONFIG).read_text()), sort_keys=True)
    except (ValueError, RecursionError) as error:
        raise InputError(f"model: '{model.name}' cannot be loaded, expected JSON in {CONFIG} ({error})") from error
    return sha256_of(config, *(sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))))


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of what the image tower takes."""
    visual: Any = model.visual
    height, width = open_clip.utils.to_2tuple(visual.image_size)
    return height, width


def freeze(model: nn.Module) -> nn.Module:
    """Make a teacher: evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)


def at_least_float32(features: torch.Tensor) -> torch.Tensor:
    """Bring what a tower gave under autocast to float32; leave float64 alone."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def use_deterministic_kernels(device: torch.device, enabled: bool = True) -> None:
    """Make training on a GPU give the same bits in every run.

    By default, the backward passes of attention and of indexing add up in an order that changes between runs. The
    switches are those of the process. A CPU needs none of them.

    Args:
        device: where the process trains.
        wanted: as the recipe says (`compute.deterministic`).
    """
    if device.type == "cuda" and enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the process first uses cuBLAS
        torch.use_deterministic_algorithms(True)  # with `warn_only`, attention stays nondeterministic
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_no_deterministic_kernel(error: RuntimeError) -> bool:
    """Whether torch raised `error` for an operation that has no deterministic implementation on the device."""
    return "does not have a deterministic implementation" in str(error)


def precision_context(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast of the towers for bf16; nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
