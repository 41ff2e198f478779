"""GSPO, arXiv 2507.18071, in its token form: the ratio of a sequence is the geometric mean of its tokens' ratios."""

from __future__ import annotations

from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.algorithms.tokens import MAX_LOG_RATIO, Given, Method, Statistic, TokenLoss, Tokens, carry_gradient, clipped


def statistics(given: Given, **_: float) -> dict[str, Statistic]:
    """The sum of log-ratios over the whole sequence."""
    return {"total": Channel(given.log_ratio, reach="sequence")}


def loss(tokens: Tokens, *, clip_low: float, clip_high: float) -> TokenLoss:
    """Per-token loss [T]: PPO's surrogate of the sequence's ratio; each token's own log-prob carries the gradient."""
    log_ratio = carry_gradient(tokens.statistics["total"] / tokens.length, tokens.logp).clamp(max=MAX_LOG_RATIO)
    return clipped(tokens, log_ratio, clip_low=clip_low, clip_high=clip_high)


GSPO = Method(loss, statistics)
