"""Samples a token on CPUs by one random number, where SGLang draws one for each word of the vocabulary.

SGLang 0.5.23 divides probabilities by exponential numbers and takes the largest. Torch draws those one by one: for 80 sequences
and 50,000 words 58 ms, most of a step. Here a number is drawn for each sequence, and the word found whose share of the whole it
falls into: the block of words first, then the word in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor

BLOCK = 256  # words whose sum is looked at first
TARGET = "sglang.srt.layers.sampler.sampling_from_probs_torch"  # which serves requests without top-k, top-p and min-p


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered. Does nothing where torch sees a CUDA device."""
    if not torch.cuda.is_available():
        HookRegistry.register(TARGET, sample, HookType.AROUND)


def sample(
    by_sglang: Callable[..., Tensor], probs: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Returns a word [B], int32, for each row of `probs` [B, V], which need not sum to one. With seeds SGLang samples."""
    if sampling_seed is not None:
        return by_sglang(probs, sampling_seed, positions)
    count, drawn = probs.shape[1], torch.rand(len(probs), 1, dtype=torch.float64)
    if count <= 2 * BLOCK:
        ends = probs.cumsum(1, dtype=torch.float64)
        return _found(ends, drawn * ends[:, -1:])[0].view(-1).int()
    whole = count // BLOCK * BLOCK
    blocks, others = probs[:, :whole].unflatten(1, (-1, BLOCK)), probs[:, whole:].unsqueeze(1)
    sums = torch.cat([part.sum(2, dtype=torch.float32) for part in (blocks, others)], 1).double()
    ends = sums.cumsum(1)
    block, rest = _found(ends, drawn * ends[:, -1:])
    words = block * BLOCK + torch.arange(BLOCK)
    shares = probs.gather(1, words.clamp(max=count - 1)).double().masked_fill_(words >= count, 0.0)
    ends = shares.cumsum(1)
    place, _ = _found(ends, rest / sums.gather(1, block) * ends[:, -1:])
    return (block * BLOCK + place).clamp_(max=count - 1).view(-1).int()


def _found(ends: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which share [B, 1] a `place` [B, 1] lies in, where they end at `ends` [B, N], and how far behind its beginning.

    Rounding may not lead past the last one, nor may what is no number.
    """
    total = ends[:, -1:]
    place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
    share = torch.searchsorted(ends, place, right=True).clamp_(max=ends.shape[1] - 1)
    begin = torch.where(share > 0, ends.gather(1, (share - 1).clamp(min=0)), 0.0)
    return share, place - begin
