"""Distillation texts of a stage, and the teacher's features of them, which are computed once and cached on disk."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from schemas.algorithm import FEATURES_VERSION
from schemas.errors import ErrorCode, InputError
from schemas.method import Distill
from zscl.data.reference_set import ReferenceSet
from zscl.data.task import TaskFolder
from zscl.models.clip import Clip, at_least_float32
from zscl.models.load_checks import check_finite
from zscl.runtime.atomic_io import atomic_file
from zscl.runtime.distributed import all_reduce_sum, broadcast_tensor, gather, rank, rank_slice
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io
from zscl.runtime.seeding import derive_seed

TEXT_BATCH_SIZE = 512
READ_TIMEOUT_SECONDS = 20.0  # limit of retries for reading a cache file; after it, the run continues without the file


def distillation_tokens(
    distill: Distill,
    clip: Clip,
    task: TaskFolder,
    tasks: Sequence[TaskFolder],
    reference: ReferenceSet | None,
    seed: int,
) -> torch.Tensor:
    """Tokenize the distillation texts of a stage.

    Args:
        distill: The recipe's `method.distill`, which selects the texts.
        clip: The model, for its tokenizer.
        task: The stage's task.
        tasks: All tasks of the sequence.
        reference: The reference set; required if `method.distill.texts` is `reference`.
        seed: The experiment's seed, for random sentences.

    Returns:
        Token ids, [N, L].

    Raises:
        InputError: Random sentences do not fit the model's text tower or tokenizer.
    """
    match distill.texts:
        case "reference":
            assert reference is not None
            return clip.tokenizer(reference.texts)
        case "class_prompts":
            selected = {"current": [task], "others": [other for other in tasks if other != task], "all": tasks}
            prompts = [
                selected_task.prompts(selected_task.templates[0]) for selected_task in selected[distill.prompts_of]
            ]
            return clip.tokenizer(list(itertools.chain.from_iterable(prompts)))
        case "random_tokens":
            return draw_random_sentences(clip.tokenizer, distill.random_texts, distill.random_length, seed)


def draw_random_sentences(tokenizer: Any, count: int, length: int, seed: int) -> torch.Tensor:
    """Draw sentences of uniform token ids between a start and an end token (LwF-VR).

    Args:
        tokenizer: CLIP's own tokenizer.
        count: N, the number of sentences.
        length: The number of random tokens in a sentence.
        seed: The experiment's seed, from which the sentences are drawn.

    Returns:
        Token ids, [N, L].

    Raises:
        InputError: The tokenizer is not CLIP's own, or the sentences are too long for the model.
    """
    try:
        start, end, context = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length
    except AttributeError as error:
        raise InputError(
            f"method.distill.texts: random_tokens needs CLIP's own tokenizer, found {type(tokenizer).__name__}",
            code=ErrorCode.UNSUPPORTED,
            field="method.distill.texts",
        ) from error
    if length + 2 > context:
        raise InputError(
            f"method.distill.random_length: found {length}, expected at most {context - 2}, because the model reads "
            f"{context} tokens, including the start and end tokens",
            code=ErrorCode.INVALID_VALUE,
            field="method.distill.random_length",
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "random texts"))
    sentences = torch.zeros(count, context, dtype=torch.long)
    sentences[:, 0], sentences[:, length + 1] = start, end
    # CLIP's special tokens are the last of the vocabulary: every id below the start token is a word piece.
    sentences[:, 1 : length + 1] = torch.randint(start, (count, length), generator=generator)
    return sentences


def embed_texts(
    tokens: torch.Tensor,
    teacher: Callable[[], nn.Module],
    folder: Path,
    weights_digest: str | None,
    device: torch.device,
    on_note: Callable[[str], None],
) -> torch.Tensor:
    """Read the teacher's text features from the cache, or compute and cache them. All ranks must call this.

    The name of the cache file is a hash of the teacher's weights and of the token ids, so another teacher, another
    tokenizer or other texts use another file. The ranks divide the computation. Only rank 0 reads and writes, so the
    other ranks need no access to the folder.

    Args:
        tokens: Token ids, [N, L].
        teacher: Returns the frozen teacher model; called only if features are computed.
        folder: The folder of the cache.
        weights_digest: The digest of the teacher's weights; `None` for a teacher that only one stage uses, whose
            features are not cached.
        device: The teacher's device.
        on_note: Called with messages for the user.

    Returns:
        L2-normalised features, [N, D], in float32 (float64 for a float64 teacher).
    """
    if weights_digest is None:
        return _embed_and_gather(teacher(), tokens, device)
    file = folder / f"texts-{sha256_of(str(FEATURES_VERSION), weights_digest, tokens.numpy().tobytes())[:24]}.npy"
    cached = _read_cached(file, len(tokens), on_note) if rank() == 0 else None
    [is_cached] = all_reduce_sum(cached is not None)  # all ranks use rank 0's value
    if is_cached:
        return broadcast_tensor(cached.to(device) if cached is not None else None, like=torch.empty(0, device=device))
    on_note(f"Teacher embeds {len(tokens)} reference texts, once")
    embedded = _embed_and_gather(teacher(), tokens, device)
    if rank() == 0:
        try:
            with atomic_file(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, embedded.cpu().numpy())
        except OSError as error:  # the cache only saves work: the run continues without it
            on_note(f"{folder}: teacher embeddings of texts are not stored ({error})")
    return embedded


def _read_cached(file: Path, count: int, on_note: Callable[[str], None]) -> torch.Tensor | None:
    """Read a cache file. Return `None` if it does not exist, cannot be read or is damaged."""
    if not file.is_file():
        return None
    try:
        array = retry_io(lambda: np.load(file, allow_pickle=False), READ_TIMEOUT_SECONDS, description=file)
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2 or len(array) != count:
            raise ValueError("the content is not an array of features")
        return torch.from_numpy(array)
    except OSError as error:
        on_note(f"{file}: cannot be read ({error}); the embeddings are computed again")
        return None
    except Exception as error:  # numpy raises exceptions of many kinds for damaged files
        on_note(f"{file}: found no embeddings of {count} texts ({error}); they are computed again")
        return None


def _embed_and_gather(teacher: nn.Module, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Encode this rank's slice of the texts, and return the features [N, D] of all texts. All ranks must call this."""
    embedded = gather(_encode_rank_texts(teacher, tokens, device), len(tokens))
    check_finite(embedded, "the teacher's features of reference texts")
    return embedded


@torch.no_grad()  # not inference_mode: the losses save these features for their backward pass
def _encode_rank_texts(teacher: nn.Module, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    rank_indices = rank_slice(len(tokens))
    chunks = tokens[rank_indices.start : rank_indices.stop].split(TEXT_BATCH_SIZE)
    encoded = [teacher.encode_text(chunk.to(device), normalize=True) for chunk in chunks]  # type: ignore[operator]
    return at_least_float32(torch.cat(encoded))
