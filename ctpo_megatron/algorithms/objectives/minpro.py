"""MinPRO, arXiv 2601.22718: a token's ratio times the smallest ratio among the tokens before it.

The smallest ratio is 1 where nothing comes before and is not held to 1 otherwise, as in the public ports.
"""

from __future__ import annotations

import torch

from ctpo_megatron.algorithms.operators import MIN
from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.algorithms.tokens import Given, Method, Statistic, TokenLoss, Tokens, clipped, weighted


def statistics(given: Given, **_: float | str) -> dict[str, Statistic]:
    """The smallest log-ratio among the sequence's policy tokens before t; +inf where there is none."""
    return {"smallest": Channel(torch.where(given.mask, given.log_ratio, torch.inf), MIN, "before")}


def loss(tokens: Tokens, *, clip_low: float, clip_high: float, form: str) -> TokenLoss:
    """Per-token loss [T]: `weight` (the paper): -sg(clip(r')) A logp; `ppo`: PPO's surrogate of r'."""
    smallest = tokens.statistics["smallest"]
    log_ratio = torch.where(torch.isinf(smallest), 0.0, smallest) + tokens.log_ratio
    surrogate = clipped if form == "ppo" else weighted
    return surrogate(tokens, log_ratio, clip_low=clip_low, clip_high=clip_high)


MINPRO = Method(loss, statistics)
