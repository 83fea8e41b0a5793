"""Checks of a CLIP model at loading: name, required packages, weights, and one forward pass of both towers."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from PIL import Image
from torch import nn

from schemas.errors import ErrorCode, InputError, did_you_mean
from schemas.experiment import LOCAL_MODEL, Model

HUB_MODEL = "hf-hub:"
HUB_TIMEOUT_SECONDS = 10.0
MAX_LISTED = 5  # names of weights in a message
EQUAL_TOLERANCE = 1e-6  # features whose entries differ by less are equal
EXAMPLE_TEXTS = ["a photo of a cat.", "two red circles on a blue wall"]


# --------------------------------------------------------------------------------------------- before loading


def check_name(model: Model, description: str) -> None:
    """Check that open_clip has a model of this name and the pretrained weights.

    Args:
        model: The recipe's model.
        description: The beginning of the error message, which names the model.

    Raises:
        InputError: There is no such model, or it has no such weights. The message proposes the nearest name.
    """
    names, name = open_clip.list_models(), model.name.replace("/", "-")
    if model.name == "embedded" or model.name.startswith((LOCAL_MODEL, HUB_MODEL)):
        return
    if name not in names:
        raise InputError(
            f"{description}: found no model of that name, expected one of open_clip.list_models(), "
            f"'{LOCAL_MODEL}FOLDER', '{HUB_MODEL}OWNER/NAME' or 'embedded'"
            f"{did_you_mean(_ignore_case(name, names), names)}",
            code=ErrorCode.UNKNOWN_NAME,
            field="model.name",
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.get_pretrained_cfg(name, model.pretrained or "") and not Path(model.pretrained or "").is_file():
        raise InputError(
            f"{description}: found neither a file nor a tag of that name, expected {', '.join([*tags, 'a file'])}"
            f"{did_you_mean(model.pretrained or '', tags)}",
            code=ErrorCode.UNKNOWN_NAME,
            field="model.pretrained",
        )


def _ignore_case(name: str, names: Sequence[str]) -> str:
    """Return the element of `names` that equals `name` if case is ignored, or else `name` itself."""
    return next((candidate for candidate in names if candidate.lower() == name.lower()), name)


def check_packages(config: Mapping[str, Any] | None, name: str, description: str) -> None:
    """Check that the package transformers is installed if the model's tokenizer or text tower needs it.

    Args:
        config: open_clip's configuration of the model; `None` if there is none.
        name: open_clip's name of the model.
        description: The beginning of the error message, which names the model.

    Raises:
        InputError: The package is missing. The message says how to install it.
    """
    text = (config or {}).get("text_cfg") or {}
    # open_clip recognises SigLIP's tokenizer by the model's name
    is_siglip = "siglip" in name.lower() and not name.startswith((LOCAL_MODEL, HUB_MODEL))
    needs_transformers = text.get("hf_model_name") or text.get("hf_tokenizer_name") or is_siglip
    if needs_transformers and importlib.util.find_spec("transformers") is None:
        raise InputError(
            f"{description}: its {'text tower' if text.get('hf_model_name') else 'tokenizer'} needs the package "
            "transformers, which is not installed; install it with pip install 'zscl[hf]'",
            code=ErrorCode.MISSING_PACKAGE,
            field="model",
        )


def check_weights_reachable(model: Model, description: str) -> None:
    """Check that the weights are in the local cache or that the Hugging Face hub can be reached.

    Without this check, huggingface_hub would retry for a minute before it reports an unreachable hub.

    Args:
        model: The recipe's model.
        description: The beginning of the error message, which names the model.

    Raises:
        InputError: The weights are not in the cache, and the hub cannot be reached. The message says how to copy the
            weights to a machine without a network.
    """
    if model.name.startswith(HUB_MODEL):
        repository, files = model.name.removeprefix(HUB_MODEL).partition("@")[0], ["open_clip_config.json"]
    else:
        hub_path = open_clip.get_pretrained_cfg(model.name.replace("/", "-"), model.pretrained or "").get("hf_hub", "")
        repository, _, file = hub_path.rpartition("/")
        files = [file or HF_WEIGHTS_NAME, HF_SAFE_WEIGHTS_NAME, f"{file.rpartition('.')[0]}.safetensors"]
    if not repository or any(
        isinstance(huggingface_hub.try_to_load_from_cache(repository, name), str) for name in files
    ):
        return
    try:
        huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(repository, files[0]), timeout=HUB_TIMEOUT_SECONDS
        )
    except HfHubHTTPError:
        return  # the hub is reachable: open_clip reports the problem, or tries another file
    except Exception as error:  # the exceptions of the HTTP library, which huggingface_hub has changed before
        arguments = f"'{model.name}'" + (f", pretrained='{model.pretrained}'" if model.pretrained else "")
        raise InputError(
            f"{description}: its weights are not on this machine, and the hub cannot be reached; expected a network, "
            f'or the weights in the cache: on a machine with a network, run python -c "import open_clip; '
            f'open_clip.create_model({arguments})" and copy its folder {huggingface_hub.constants.HF_HUB_CACHE} here '
            f"({type(error).__name__}: {' '.join(str(error).split())})",
            code=ErrorCode.UNREACHABLE,
            field="model",
        ) from error


# ------------------------------------------------------------------------------------------------ the weights


def describe_differences(network: nn.Module, weights: Mapping[str, Any]) -> str:
    """Describe how weights differ in names and shapes from those that a network expects.

    Args:
        network: The network.
        weights: The weights that were read from a file, with their names as keys.

    Returns:
        The names of missing, unexpected and differently shaped weights; empty if the weights fit.
    """
    expected = {name: list(value.shape) for name, value in network.state_dict().items()}
    actual = {name: list(getattr(value, "shape", [])) for name, value in weights.items()}
    differences = {
        "missing": [name for name in expected if name not in actual],
        "unexpected": [name for name in actual if name not in expected],
        "of another shape": [
            f"{name} {actual[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in actual and actual[name] != shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:MAX_LISTED])}{', …' if len(names) > MAX_LISTED else ''}"
        for kind, names in differences.items()
        if names
    )


def describe_mismatch(name: str, file: Path) -> str:
    """Describe how the weights in a file differ from those of an architecture.

    Args:
        name: open_clip's name of the architecture.
        file: The file of weights.

    Returns:
        The differences; empty if there are none or if they cannot be determined.
    """
    try:
        network = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        weights = open_clip.factory.load_state_dict(str(file))
        weights = open_clip.convert.convert_state_dict(network, weights)
        if "positional_embedding" in weights and not hasattr(network, "positional_embedding"):
            weights = open_clip.model.convert_to_custom_text_state_dict(weights)
        for key, expected in network.state_dict().items():  # ignore the differences that open_clip resolves itself
            weight = weights.get(key)
            is_resized = (
                key.endswith("positional_embedding") and weight is not None and weight.shape[-1] == expected.shape[-1]
            )
            is_scale = key == "logit_scale" and weight is not None and weight.numel() == 1
            if is_resized or is_scale or key == "logit_bias":
                weights[key] = expected
        return describe_differences(network, weights)
    except Exception:  # open_clip's own error describes the problem
        return ""


# ------------------------------------------------------------------------------------------- one forward pass


@torch.no_grad()
def check_features(
    model: Any,
    tokenizer: Callable[[list[str]], torch.Tensor],
    image_transform: Callable[[Any], torch.Tensor],
    description: str,
    device: torch.device | str,
) -> None:
    """Check the weights of a model, and the features that it computes for two images and two texts.

    Args:
        model: open_clip's model.
        tokenizer: The model's tokenizer.
        image_transform: The model's transform for evaluation.
        description: The beginning of the error message, which names the model.
        device: The model's device.

    Raises:
        InputError: Weights or features are not finite, features do not have shape [n, D] with the same D for images and
            texts, different inputs have the same features, or the model's code raises an error.
    """
    not_finite = [
        name
        for name, weight in model.named_parameters()
        # CoCa's decoder does not compute features, and open_clip leaves some of its weights uninitialised.
        if not name.startswith("text_decoder.") and not bool(weight.isfinite().all())
    ]
    if not_finite:
        more = f" and {len(not_finite) - MAX_LISTED} more" if len(not_finite) > MAX_LISTED else ""
        raise InputError(
            f"{description}: found NaN or Inf in its weights {', '.join(not_finite[:MAX_LISTED])}{more}, "
            "expected numbers",
            code=ErrorCode.NOT_FINITE,
            field="model",
        )
    was_training = model.training
    model.eval()
    try:
        with _errors_as_input_errors(f"{description}: its image transform fails on an image"):
            pictures = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB")]
            images = torch.stack([image_transform(picture) for picture in pictures]).to(device)
        with _errors_as_input_errors(f"{description}: its tokenizer fails on a text"):
            tokens = tokenizer(EXAMPLE_TEXTS)
        _check_token_ids(model, tokens, description)
        image_features = _encode(model, "encode_image", images, f"{description}: its image tower")
        text_features = _encode(model, "encode_text", tokens.to(device), f"{description}: its text tower")
        with _errors_as_input_errors(f"{description}: its logit scale cannot be read"):
            scale = model.logit_scale.exp()
    finally:
        model.train(was_training)
    if image_features.shape != text_features.shape:
        raise InputError(
            f"{description}: found image features of width {image_features.shape[1]} and text features "
            f"of width {text_features.shape[1]}, expected the same width from both towers",
            code=ErrorCode.MISMATCH,
            field="model",
        )
    if scale.numel() != 1 or not bool(scale.isfinite().all()):
        raise InputError(
            f"{description}: found the logit scale {scale.flatten().tolist()[:MAX_LISTED]}, expected one finite number",
            code=ErrorCode.NOT_FINITE,
            field="model",
        )


def _encode(model: Any, encode: str, inputs: torch.Tensor, tower: str) -> torch.Tensor:
    """Encode inputs with the method `encode` of a model, and return the checked features, [n, D]."""
    expected = f"expected features of shape [{len(inputs)}, D]"
    with _errors_as_input_errors(f"{tower} fails on inputs of shape {list(inputs.shape)}, {expected}"):
        features = getattr(model, encode)(inputs, normalize=True)
    if not isinstance(features, torch.Tensor):
        problem = f"{tower} returns {type(features).__name__}, {expected}"
        raise InputError(problem, code=ErrorCode.UNSUPPORTED, field="model")
    if features.ndim != 2 or len(features) != len(inputs) or not features.is_floating_point():
        problem = f"{tower} returns {features.dtype} of shape {list(features.shape)}, {expected}"
        raise InputError(problem, code=ErrorCode.UNSUPPORTED, field="model")
    check_finite(features, f"{tower} returns features that")
    if not bool((features.norm(dim=1) > 0).all()):
        problem = f"{tower} returns features that are all zero, {expected} and of length 1"
        raise InputError(problem, code=ErrorCode.UNSUPPORTED, field="model")
    if bool((features[0] - features[1]).abs().max() < EQUAL_TOLERANCE):
        problem = f"{tower} returns the same features for different inputs, {expected} that differ"
        raise InputError(problem, code=ErrorCode.UNSUPPORTED, field="model")
    return features


def _check_token_ids(model: Any, tokens: torch.Tensor, description: str) -> None:
    """Refuse token ids without an embedding. Looking up such an id on a GPU would end the process."""
    embedding = getattr(getattr(model, "text", model), "token_embedding", None)
    if isinstance(embedding, nn.Embedding) and int(tokens.max()) >= embedding.num_embeddings:
        raise InputError(
            f"{description}: its tokenizer returns the token id {int(tokens.max())}, but the model has "
            f"{embedding.num_embeddings} token embeddings, expected the tokenizer that the model was trained with",
            code=ErrorCode.MISMATCH,
            field="model",
        )


@contextmanager
def _errors_as_input_errors(problem: str) -> Iterator[None]:
    """Turn any error of a model's code into an `InputError` whose message begins with `problem`."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's code may raise any exception
        raise InputError(
            f"{problem} ({type(error).__name__}: {' '.join(str(error).split())})",
            code=ErrorCode.UNSUPPORTED,
            field="model",
        ) from error


def check_finite(features: torch.Tensor, subject: str) -> None:
    """Check that features have no NaN and no Inf.

    Args:
        features: A tensor of any shape.
        subject: The subject of the error message, such as "the teacher's features of reference texts".

    Raises:
        InputError: A feature is not finite.
    """
    if not bool(features.isfinite().all()):
        raise InputError(f"{subject} are NaN or Inf, expected finite numbers", code=ErrorCode.NOT_FINITE, field="model")
