"""The walk over a vocabulary, block by block, that log-probs of words are made from: no more than some words' logits at a time.

Products are in the model's number format, sums and exponentials in float32. Under tensor parallelism each rank walks its slice of
the vocabulary, and one all-gather of a few numbers per token joins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.kernels.cpu.linear import product, takes
from ctpo_megatron.parallel.gather import all_gather_single

BLOCK = 2**23  # logits held at once: 32 MiB in float32; larger blocks are not faster
FEWEST_WORDS = 128  # of a block, however many tokens there are
KEPT_ON_CPU = 2**28  # logits in float32 that the forward keeps for the backward on a CPU, if they are all of them: 1 GiB


class Summary(NamedTuple):
    """What one rank finds for its words, with logits l already divided by the temperature."""

    top: Tensor  # [T], max l
    total: Tensor  # [T], sum of exp(l - top)
    weighted: Tensor  # [T], sum of (l - top) exp(l - top); zeros where the entropy is not asked for
    picked: Tensor  # [T, I], l at the ids that are this rank's, 0 at the others


class Kept(NamedTuple):
    """A block of the forward, for the backward."""

    first: int  # of its words, among this rank's
    shifted: Tensor  # [T, words], l - top
    top: Tensor  # [T], of the words up to and with the block's


def blocks_of(tokens: int, words: int) -> Iterator[slice]:
    """The words 0 to `words`, so many at a time that their logits for `tokens` tokens are held at once."""
    step = max(1, min(words, max(FEWEST_WORDS, BLOCK // max(tokens, 1))))
    for begin in range(0, words, step):
        yield slice(begin, min(begin + step, words))


def keeps_all(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the forward keeps every block: where a product costs more than memory does, and there is not too much of it."""
    return hidden.device.type == "cpu" and weight.dtype == torch.float32 and len(hidden) * len(weight) <= KEPT_ON_CPU


def blocks(hidden: Tensor, weight: Tensor, lasting: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some words at a time: which, their logits [T, words] as computed, and a float32 buffer of that shape.

    In float32 the two are one tensor. The next block takes the same memory, unless they are `lasting`.
    """
    tokens, parts = hidden.shape[0], list(blocks_of(hidden.shape[0], weight.shape[0]))
    if lasting and takes(hidden, weight):
        for part in parts:
            logits = product(hidden, weight[part])
            yield part, logits, logits
        return
    memory = torch.empty(tokens * (parts[0].stop if parts else 0), dtype=weight.dtype, device=weight.device)
    floats = memory if weight.dtype == torch.float32 else torch.empty_like(memory, dtype=torch.float32)
    for part in parts:
        if lasting and part.start:
            memory = floats = torch.empty_like(memory)
        shape = (tokens, part.stop - part.start)
        size = shape[0] * shape[1]
        logits = torch.mm(hidden, weight[part].t(), out=memory[:size].view(shape))
        yield part, logits, logits if floats is memory else floats[:size].view(shape)


def in_float(logits: Tensor, buffer: Tensor) -> Tensor:
    """The logits of a block as float32, in its buffer."""
    return logits if logits is buffer else buffer.copy_(logits)


def places(ids: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Column of each id [T, I] in a block, 0 where it is not in it, and whether it is."""
    place = ids - words.start
    mine = (place >= 0) & (place < words.stop - words.start)
    return place.masked_fill_(~mine, 0), mine


def summarise(
    hidden: Tensor, weight: Tensor, ids: Tensor, scale: float, entropy: bool, keep: bool = False
) -> tuple[Summary, list[Kept]]:
    """What one rank's words `weight` say, with logits at `ids` [T, I], which count from its first word; and its last blocks.

    `keep`: whether a backward will come; with `entropy` the last block is kept for it, or all where `keeps_all` says so.
    """
    top = torch.full((hidden.shape[0],), torch.finfo(torch.float32).min, device=hidden.device)
    total, weighted = torch.zeros_like(top), torch.zeros_like(top)
    picked = torch.zeros(ids.shape, device=hidden.device)
    products: Tensor | None = None
    kept: list[Kept] = []
    every = keep and entropy and keeps_all(hidden, weight)
    for words, logits, buffer in blocks(hidden, weight, every):
        place, mine = places(ids, words)
        picked = torch.where(mine, logits.gather(-1, place).float() * scale, picked)
        now = torch.maximum(top, logits.amax(-1).float() * scale)
        shift, top = top - now, now
        shifted = torch.add(-top.unsqueeze(-1), in_float(logits, buffer), alpha=scale, out=buffer)
        shrink = shift.exp()
        if entropy:
            products = torch.empty_like(buffer) if products is None else products.view(-1)[: buffer.numel()].view_as(buffer)
            weights = torch.exp(shifted, out=products)
            weighted = (weighted + total * shift) * shrink
            total = total * shrink + weights.sum(-1)
            weighted += weights.mul_(shifted).sum(-1)
            kept = [*(kept if every else []), Kept(words.start, shifted, top)]
        else:
            total = total * shrink + shifted.exp_().sum(-1)
    return Summary(top, total, weighted, picked), kept


def join(mine: Summary, group: dist.ProcessGroup) -> Summary:
    """All ranks' words as one: one all-gather of 3 + I numbers per token."""
    sent = torch.cat([torch.stack(mine[:3]), mine.picked.t()])
    gathered = sent.new_empty(group.size() * sent.numel())
    all_gather_single(gathered, sent.view(-1), group)
    gathered = gathered.view(-1, *sent.shape)
    tops, totals, weighted = gathered[:, :3].unbind(1)
    top = tops.amax(0)
    shift = tops - top
    shrink = shift.exp()
    return Summary(
        top, (totals * shrink).sum(0), ((weighted + totals * shift) * shrink).sum(0), gathered[:, 3:].sum(0).t().contiguous()
    )
