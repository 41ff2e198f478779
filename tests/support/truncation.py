"""What truncated sampling may draw, worked out by transformers' log-probs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ctpo_megatron.types import Generation, Truncation

EDGE = 1e-4  # of a probability: so near a cut, two implementations may decide differently


def whole_logp(model: torch.nn.Module, prompt: list[int], generation: Generation, temperature: float) -> Tensor:
    """[tokens, V] log-probs at the place of every sampled token."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + generation.token_ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double() / temperature, -1)


def bounds(logp: Tensor, cut: Truncation) -> tuple[set[int], set[int]]:
    """Words that are in the support for certain, and those that may be, of one place with log-probs [V]."""
    probs, order = logp.exp().sort(descending=True)
    before, rank = probs.cumsum(0) - probs, torch.arange(len(probs))

    def inside(slack: float) -> set[int]:
        keep = (rank < (cut.top_k or len(probs))) & (before <= cut.top_p + slack) & (probs >= probs[0] * cut.min_p - slack)
        return set(order[keep].tolist())

    return inside(-EDGE), inside(EDGE)


def check_supports(
    model: torch.nn.Module, prompt: list[int], generation: Generation, temperature: float, cut: Truncation
) -> None:
    """Each support is what `cut` leaves, and log-probs are of the distribution among it."""
    supports = generation.supports
    assert supports is not None
    assert len(supports.counts) == len(generation.token_ids)
    for t, (logp, row) in enumerate(
        zip(whole_logp(model, prompt, generation, temperature), supports.rows(supports.width), strict=True)
    ):
        words = {int(word) for word in row if word >= 0}
        surely, perhaps = bounds(logp, cut)
        assert surely <= words <= perhaps, t
        among = logp[sorted(words)].logsumexp(0)
        assert abs(float(logp[generation.token_ids[t]] - among) - generation.rollout_logp[t]) < 1e-4, t
