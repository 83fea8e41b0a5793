"""Checks of a model when it is loaded: its name, its packages, its weights, and one forward pass of both towers."""

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

from schemas.errors import InputError, did_you_mean
from schemas.experiment import LOCAL_MODEL, Model

HUB_MODEL = "hf-hub:"
HUB_TIMEOUT_SECONDS = 10.0
NAMED = 5  # weights in a sentence
SAME = 1e-6  # between features, each number: no difference
TEXTS = ["a photo of a cat.", "two red circles on a blue wall"]


# --------------------------------------------------------------------------------------------- before loading


def check_name(model: Model, shown: str) -> None:
    """Refuse a name that open_clip does not know, with the nearest one, or weights that it does not have.

    Raises:
        InputError: there is no such model, or no such weights of it.
    """
    known, name = open_clip.list_models(), model.name.replace("/", "-")
    if model.name == "embedded" or model.name.startswith((LOCAL_MODEL, HUB_MODEL)):
        return
    if name not in known:
        raise InputError(
            f"{shown}: found no model of that name, expected one of open_clip.list_models(), '{LOCAL_MODEL}FOLDER', "
            f"'{HUB_MODEL}OWNER/NAME' or 'embedded'{did_you_mean(_spelt(name, known), known)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.get_pretrained_cfg(name, model.pretrained or "") and not Path(model.pretrained or "").is_file():
        raise InputError(
            f"{shown}: found neither a file nor a tag of that name, expected {', '.join([*tags, 'a file'])}"
            f"{did_you_mean(model.pretrained or '', tags)}"
        )


def _spelt(name: str, known: Sequence[str]) -> str:
    """The name as a known one is spelt, where they differ in capitals alone."""
    return next((each for each in known if each.lower() == name.lower()), name)


def check_packages(config: Mapping[str, Any] | None, name: str, shown: str) -> None:
    """Refuse a model whose tokenizer or text tower needs the package transformers, where that is not installed.

    Raises:
        InputError: saying what to install.
    """
    text = (config or {}).get("text_cfg") or {}
    by_name = "siglip" in name.lower() and not name.startswith((LOCAL_MODEL, HUB_MODEL))  # as open_clip has it
    needs = text.get("hf_model_name") or text.get("hf_tokenizer_name") or by_name
    if needs and importlib.util.find_spec("transformers") is None:
        raise InputError(
            f"{shown}: its {'text tower' if text.get('hf_model_name') else 'tokenizer'} needs the package "
            "transformers, which is not installed; expected it: pip install 'zscl[hf]'"
        )


def check_weights_reachable(model: Model, shown: str) -> None:
    """Refuse weights that are not in the cache if the hub cannot be reached: huggingface_hub retries for a minute.

    Raises:
        InputError: saying how to get the weights onto a machine without a network.
    """
    if model.name.startswith(HUB_MODEL):
        repository, files = model.name.removeprefix(HUB_MODEL).partition("@")[0], ["open_clip_config.json"]
    else:
        place = open_clip.get_pretrained_cfg(model.name.replace("/", "-"), model.pretrained or "").get("hf_hub", "")
        repository, _, file = place.rpartition("/")
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
        return  # it answers: open_clip says what is wrong, or tries another file
    except Exception as error:  # of the HTTP library, which huggingface_hub has changed before
        arguments = f"'{model.name}'" + (f", pretrained='{model.pretrained}'" if model.pretrained else "")
        raise InputError(
            f"{shown}: its weights are not on this machine, and the hub cannot be reached; expected a network, or the "
            f'weights in the cache: on a machine with a network, run python -c "import open_clip; '
            f'open_clip.create_model({arguments})" and copy its folder {huggingface_hub.constants.HF_HUB_CACHE} here '
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


# ------------------------------------------------------------------------------------------------ the weights


def describe_differences(network: nn.Module, weights: Mapping[str, Any]) -> str:
    """How weights differ from what a network expects, by name; empty where they fit.

    Args:
        network: whose parameters they should be.
        weights: by name, as read from a file.
    """
    expected = {name: list(value.shape) for name, value in network.state_dict().items()}
    found = {name: list(getattr(value, "shape", [])) for name, value in weights.items()}
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}"
        for kind, names in kinds.items()
        if names
    )


def describe_mismatch(name: str, file: Path) -> str:
    """How the weights in a file differ from those of an architecture; empty where that cannot be told.

    Args:
        name: open_clip's name of the architecture.
        file: of weights.
    """
    try:
        network = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        weights = open_clip.factory.load_state_dict(str(file))
        weights = open_clip.convert.convert_state_dict(network, weights)
        if "positional_embedding" in weights and not hasattr(network, "positional_embedding"):
            weights = open_clip.model.convert_to_custom_text_state_dict(weights)
        for each, own in network.state_dict().items():  # what open_clip makes fit is no difference
            held = weights.get(each)
            resized = each.endswith("positional_embedding") and held is not None and held.shape[-1] == own.shape[-1]
            if resized or each == "logit_bias" or (each == "logit_scale" and held is not None and held.numel() == 1):
                weights[each] = own
        return describe_differences(network, weights)
    except Exception:  # whatever is wrong beside, open_clip's own error says it
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
    """Encode two images and two texts, and refuse features that nothing can be computed with.

    Args:
        model: a CLIP of open_clip.
        tokenizer: the model's.
        image_transform: the model's transform for evaluation.
        shown: what the model is called in a sentence.
        device: where the model is.

    Raises:
        InputError: weights or features are not finite, features are not of shape [n, D] with one D for both towers, or
            a tower fails.
    """
    wrong = [
        name
        for name, weight in model.named_parameters()
        # CoCa's decoder takes no part in features, and open_clip leaves some of its weights uninitialised.
        if not name.startswith("text_decoder.") and not bool(weight.isfinite().all())
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise InputError(f"{description}: found NaN or Inf in its weights {', '.join(wrong[:NAMED])}{more}, expected numbers")
    was_training = model.training
    model.eval()
    try:
        with _failure_named(f"{description}: its image transform fails on an image"):
            pictures = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB")]
            images = torch.stack([image_transform(picture) for picture in pictures]).to(device)
        with _failure_named(f"{description}: its tokenizer fails on a text"):
            tokens = tokenizer(TEXTS)
        _refuse_unknown_tokens(model, tokens, description)
        image_features = _encode(model, "encode_image", images, f"{description}: its image tower")
        text_features = _encode(model, "encode_text", tokens.to(device), f"{description}: its text tower")
        with _failure_named(f"{description}: its logit scale cannot be read"):
            scale = model.logit_scale.exp()
    finally:
        model.train(was_training)
    if image_features.shape != text_features.shape:
        raise InputError(
            f"{description}: found features of {image_features.shape[1]} numbers an image and {text_features.shape[1]} a "
            "text, expected as many from both towers"
        )
    if scale.numel() != 1 or not bool(scale.isfinite().all()):
        raise InputError(
            f"{description}: found the logit scale {scale.flatten().tolist()[:NAMED]}, expected one finite number"
        )


def _encode(model: Any, encode: str, inputs: torch.Tensor, tower: str) -> torch.Tensor:
    """Call a tower, and check what it returns. Returns features [n, D]."""
    expected = f"expected features of shape [{len(inputs)}, D]"
    with _failure_named(f"{tower} fails on inputs of shape {list(inputs.shape)}, {expected}"):
        features = getattr(model, encode)(inputs, normalize=True)
    if not isinstance(features, torch.Tensor):
        raise InputError(f"{tower} returns {type(features).__name__}, {expected}")
    if features.ndim != 2 or len(features) != len(inputs) or not features.is_floating_point():
        raise InputError(f"{tower} returns {features.dtype} of shape {list(features.shape)}, {expected}")
    check_finite(features, f"{tower} returns")
    if not bool((features.norm(dim=1) > 0).all()):
        raise InputError(f"{tower} returns features that are all zero, {expected} and of length 1")
    if bool((features[0] - features[1]).abs().max() < SAME):
        raise InputError(f"{tower} returns the same features for unlike inputs, {expected} that tell them apart")
    return features


def _refuse_unknown_tokens(model: Any, tokens: torch.Tensor, shown: str) -> None:
    """Refuse tokens that have no embedding: on a GPU, looking one up ends the process."""
    embedding = getattr(getattr(model, "text", model), "token_embedding", None)
    if isinstance(embedding, nn.Embedding) and int(tokens.max()) >= embedding.num_embeddings:
        raise InputError(
            f"{shown}: found the token {int(tokens.max())} from its tokenizer and {embedding.num_embeddings} token "
            "embeddings, expected the tokenizer that the model was trained with"
        )


@contextmanager
def _failure_named(what: str) -> Iterator[None]:
    """Turn what a model's code raises into a sentence that begins with `what`."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's code raises what it meets
        raise InputError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())})") from error


def check_finite(features: torch.Tensor, subject: str) -> None:
    """Refuse features that are NaN or Inf.

    Args:
        features: of any shape.
        what: begins the sentence: whose they are.

    Raises:
        InputError: they are.
    """
    if not bool(features.isfinite().all()):
        raise InputError(f"{subject} features that are NaN or Inf, expected finite numbers")
