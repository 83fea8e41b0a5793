"""What is distilled on: the texts, and the teacher's embeddings of them, computed once and stored by content."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from schemas.algorithm import FEATURES_VERSION
from schemas.errors import InputError
from schemas.method import Distill
from zscl.data.reference_set import ReferenceSet
from zscl.data.task import TaskFolder
from zscl.models.clip import Clip, at_least_float32
from zscl.models.load_checks import check_finite
from zscl.runtime.atomic_io import atomic_file
from zscl.runtime.distributed import all_reduce_ints, broadcast_tensor, gather, rank, rank_slice
from zscl.runtime.hashing import sha256_of
from zscl.runtime.retry import retry_io
from zscl.runtime.seeding import derive_seed

TEXTS_AT_ONCE = 512
READ_SECONDS = 20.0  # to wait for a file that storage does not give: a run goes on without it


def distillation_tokens(
    distill: Distill,
    clip: Clip,
    task: TaskFolder,
    tasks: Sequence[TaskFolder],
    reference: ReferenceSet | None,
    seed: int,
) -> torch.Tensor:
    """Token ids of the texts that a stage distils on. [N, L]

    Args:
        distill: which texts.
        clip: the tokenizer.
        task: of the stage.
        tasks: all tasks of the sequence.
        reference: for its texts.
        seed: of random sentences.

    Raises:
        InputError: random sentences do not fit the model's text tower or tokenizer.
    """
    match distill.texts:
        case "reference":
            assert reference is not None
            return clip.tokenizer(reference.texts)
        case "class_prompts":
            wanted = {"current": [task], "others": [each for each in tasks if each != task], "all": tasks}
            prompts = [each.prompts(each.templates[0]) for each in wanted[distill.prompts_of]]
            return clip.tokenizer(list(itertools.chain.from_iterable(prompts)))
        case "random_tokens":
            return random_sentences(clip.tokenizer, distill.random_texts, distill.random_length, seed)


def random_sentences(tokenizer: Any, count: int, length: int, seed: int) -> torch.Tensor:
    """Uniform token ids between a start and an end token (LwF-VR). [count, L], drawn from the seed alone."""
    try:
        start, end, context = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.context_length
    except AttributeError as error:
        raise InputError(
            f"method.distill.texts: random_tokens needs CLIP's own tokenizer, found {type(tokenizer).__name__}"
        ) from error
    if length + 2 > context:
        raise InputError(
            f"method.distill.random_length: found {length}, expected at most {context - 2}: the model reads {context} "
            "tokens with start and end"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "random texts"))
    sentences = torch.zeros(count, context, dtype=torch.long)
    sentences[:, 0], sentences[:, length + 1] = start, end
    # CLIP's special tokens are the vocabulary's last: every id below the start token is a plain one.
    sentences[:, 1 : length + 1] = torch.randint(start, (count, length), generator=generator)
    return sentences


def embed_texts(
    tokens: torch.Tensor,
    teacher: Callable[[], nn.Module],
    store: Path,
    weights: str | None,
    device: torch.device,
    note: Callable[[str], None],
) -> torch.Tensor:
    """Read the teacher's text embeddings from the store; compute and store them when they are not there.

    The file's name is a hash of the teacher's weights and of the very tokens, so neither another teacher nor
    another tokenizer nor changed texts can meet a stale file. The workers share the computing; only the main
    worker reads and writes, so the store need not be visible to the others.

    Args:
        tokens: [N, L].
        teacher: gives the frozen model, when it is needed.
        store: folder of the store.
        weights: digest of the teacher's weights; `None` for a teacher of one stage, whose embeddings are not stored.
        device: where the teacher lies.
        note: told when they are computed.

    Returns [N, D], normalised, float32 (float64 for a float64 teacher).
    """
    if weights is None:
        return _embedded(teacher(), tokens, device)
    file = store / f"texts-{sha256_of(str(FEATURES_VERSION), weights, tokens.numpy().tobytes())[:24]}.npy"
    stored = _stored(file, len(tokens), note) if rank() == 0 else None
    [found] = all_reduce_ints(stored is not None)  # the main worker's answer, for all
    if found:
        return broadcast_tensor(stored.to(device) if stored is not None else None, like=torch.empty(0, device=device))
    note(f"Teacher embeds {len(tokens)} reference texts, once")
    embedded = _embedded(teacher(), tokens, device)
    if rank() == 0:
        try:
            with atomic_file(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, embedded.cpu().numpy())
        except OSError as error:  # a store saves work; a run goes on without it
            note(f"{store}: teacher embeddings of texts are not stored ({error})")
    return embedded


def _stored(file: Path, count: int, note: Callable[[str], None]) -> torch.Tensor | None:
    """What a file of the store holds; `None` where it is none, or is damaged."""
    if not file.is_file():
        return None
    try:
        array = retry_io(lambda: np.load(file, allow_pickle=False), READ_SECONDS, what=file)
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2 or len(array) != count:
            raise ValueError("other numbers than embeddings")
        return torch.from_numpy(array)
    except OSError as error:
        note(f"{file}: cannot be read ({error}); the embeddings are computed again")
        return None
    except Exception as error:  # what numpy raises on foreign bytes is no closed list
        note(f"{file}: found no embeddings of {count} texts ({error}); they are computed again")
        return None


def _embedded(teacher: nn.Module, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The embeddings of all workers' tokens. [N, D]"""
    embedded = gather(_encode(teacher, tokens, device), len(tokens))
    check_finite(embedded, "the teacher gives reference texts")
    return embedded


@torch.no_grad()  # not inference_mode: the losses save these embeddings for their backward pass
def _encode(teacher: nn.Module, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    own = rank_slice(len(tokens))
    chunks = tokens[own.start : own.stop].split(TEXTS_AT_ONCE)
    encoded = [teacher.encode_text(chunk.to(device), normalize=True) for chunk in chunks]  # type: ignore[operator]
    return at_least_float32(torch.cat(encoded))
