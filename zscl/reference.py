"""The teacher's embeddings of the reference texts: computed once, stored by content."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from zscl.distributed import from_main, gather, rank, share, sum_over_workers
from zscl.files import digest, whole_file
from zscl.model import Clip, at_least_float32

TEXTS_AT_ONCE = 512


def text_embeddings(
    clip: Clip,
    teacher: nn.Module,
    texts: list[str],
    store: Path,
    weights: str,
    device: torch.device,
    note: Callable[[str], None],
) -> torch.Tensor:
    """Read the teacher's text embeddings from the store; compute and store them when they are not there.

    The file's name is a hash of the teacher's weights and of the very tokens, so neither another teacher nor
    another tokenizer nor changed texts can meet a stale file. The workers share the computing; only the main
    worker reads and writes, so the store need not be visible to the others.

    Args:
        clip: its tokenizer.
        teacher: the frozen model.
        texts: N reference texts.
        store: folder of the store.
        weights: digest of the teacher's weights.
        device: where the teacher lies.
        note: told what was found or done.

    Returns [N, D], normalised, float32 (float64 for a float64 teacher).
    """
    tokens = clip.tokenizer(texts)
    file = store / f"texts-{digest(weights, tokens.numpy().tobytes())[:24]}.npy"
    [found] = sum_over_workers(rank() == 0 and file.is_file())  # the main worker's answer, for all
    if found:
        note(f"Teacher's embeddings of {len(texts)} reference texts read from {file}")
        stored = torch.from_numpy(np.load(file)).to(device) if rank() == 0 else None
        return from_main(stored, like=torch.empty(0, device=device))
    note(f"Teacher embeds {len(texts)} reference texts, once")
    embedded = gather(_encode(teacher, tokens, device), len(texts))
    if rank() == 0:
        with whole_file(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, embedded.cpu().numpy())
    return embedded


@torch.no_grad()  # not inference_mode: the losses save these embeddings for their backward pass
def _encode(teacher: nn.Module, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    own = share(len(tokens))
    chunks = tokens[own.start : own.stop].split(TEXTS_AT_ONCE)
    encoded = [teacher.encode_text(chunk.to(device), normalize=True) for chunk in chunks]  # type: ignore[operator]
    return at_least_float32(torch.cat(encoded))
