"""What every objective is given about the tokens of a micro-batch, and what it gives back.

An objective is a `Method`: the statistics of whole sequences that it needs, and a loss that looks at one token at a time.
Statistics carry no gradient; a token's gradient comes through its own log-prob alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ctpo_megatron.algorithms.operators import MAX_ABS
from ctpo_megatron.algorithms.scan import Channel
from ctpo_megatron.kernels.numbers import MAX_LOG_RATIO as MAX_LOG_RATIO


class Support(NamedTuple):
    """Both policies at the sampling policy's top-k tokens and the sampled one; -inf marks an unused column. No gradient."""

    logp: Tensor  # [T, K], of the current policy
    rollout_logp: Tensor  # [T, K], of the policy that sampled


class Given(NamedTuple):
    """Per-token inputs [T] that statistics are made of, without gradient. What is read is zero where masked."""

    raw_logp: Tensor
    raw_anchor: Tensor
    raw_advantages: Tensor
    mask: Tensor  # bool
    log_ratio: Tensor  # clamp(logp - anchor, +-20)
    support: Support | None

    @property
    def logp(self) -> Tensor:
        """Log-prob of the current policy."""
        return torch.where(self.mask, self.raw_logp, 0.0)

    @property
    def anchor(self) -> Tensor:
        """Log-prob of the policy that the ratio is taken against."""
        return torch.where(self.mask, self.raw_anchor, 0.0)

    @property
    def advantages(self) -> Tensor:
        """Advantages."""
        return torch.where(self.mask, self.raw_advantages, 0.0)


class Quantile(NamedTuple):
    """A statistic: a quantile of the sequence's unmasked values [T]."""

    values: Tensor
    q: float


Statistic = Tensor | Channel | Quantile
"""Per token [T] as it is, or scanned. A channel of reach `sequence` and a quantile are the same on all tokens of a sequence."""


class Tokens(NamedTuple):
    """Per-token inputs [T] of a loss; in a `part`, masked positions hold zeros, whatever was there before."""

    logp: Tensor  # with grad
    anchor: Tensor
    advantages: Tensor
    mask: Tensor  # bool
    prefix_sum: Tensor  # of log-ratios over the sequence's unmasked tokens up to and including t
    position: Tensor  # 1-based index among the sequence's unmasked tokens; in a `part` at least 1
    length: Tensor  # unmasked tokens of the token's whole sequence; at least 1
    statistics: Mapping[str, Tensor]  # the method's own

    @property
    def log_ratio(self) -> Tensor:
        """clamp(logp - anchor, +-20), with grad."""
        return (self.logp - self.anchor).clamp(-MAX_ABS, MAX_ABS)

    def part(self, part: slice) -> Tokens:
        """Some of the tokens, whose log-prob is a leaf of its own."""
        mask, dtype = self.mask[part], self.logp.dtype
        return Tokens(
            logp=torch.where(mask, self.logp[part].detach(), 0.0).requires_grad_(),
            anchor=torch.where(mask, self.anchor[part].detach().to(dtype), 0.0),
            advantages=torch.where(mask, self.advantages[part].to(dtype), 0.0),
            mask=mask,
            prefix_sum=self.prefix_sum[part],
            position=self.position[part].to(dtype).clamp(min=1),
            length=self.length[part],
            statistics={name: stream[part] for name, stream in self.statistics.items()},
        )


class TokenLoss(NamedTuple):
    """A method's result: unreduced loss [T], and what became of the tokens, for the record."""

    loss: Tensor
    log_ratio: Tensor  # [T], what was clipped or judged
    high: Tensor  # [T] bool: held back from growing although their advantage is positive
    low: Tensor  # [T] bool: held back from shrinking further although their advantage is negative
    dual: Tensor | None = None  # [T] bool: cut by the dual clip
    band: Tensor | None = None  # [T], what the bounds grew with over the position, where that is not the position


class Seen(NamedTuple):
    """What became of the tokens of a micro-batch or shard [T], for the record; what stands where masked says nothing."""

    log_ratio: Tensor  # float16, what was clipped or judged
    fate: Tensor  # uint8, `record.token_files.FATES`: 0, 1 where `high`, 2 where `low`, 3 where `dual`

    @classmethod
    def of(cls, out: TokenLoss) -> Seen:
        """Returns it of a method's result."""
        fate = out.high.to(torch.uint8) + 2 * out.low.to(torch.uint8)
        return cls.of_bits(out.log_ratio.detach(), fate if out.dual is None else fate + 4 * out.dual.to(torch.uint8))

    @classmethod
    def of_bits(cls, log_ratio: Tensor, bits: Tensor) -> Seen:
        """Returns it of judged log-ratios [T] and of fates as bits [T] uint8: 1 `high`, 2 `low`, 4 `dual`."""
        fate = torch.where(bits >= 4, 3, torch.where(bits == 3, 1, bits))
        largest = torch.finfo(torch.float16).max
        return cls(log_ratio.clamp(-largest, largest).half(), fate.to(torch.uint8))


class Method(NamedTuple):
    """An objective. `loss` and `statistics` take the options of its config as keywords."""

    loss: Callable[..., TokenLoss]  # (Tokens, **options)
    statistics: Callable[..., dict[str, Statistic]] = lambda given, **options: {}  # (Given, **options)


def carry_gradient(value: Tensor, logp: Tensor) -> Tensor:
    """`value` with the gradient of `logp`: bit-equal to `value`, as logp - sg(logp) is exactly zero."""
    return value.detach() + (logp - logp.detach())


def clipped(tokens: Tokens, log_ratio: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None) -> TokenLoss:
    """PPO's pessimistic surrogate: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -A dual_clip where A < 0."""
    ratio, advantages = torch.exp(log_ratio), tokens.advantages
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    negative, dual = advantages < 0, None
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        dual = negative & (loss > ceiling)
        loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    high, low = (ratio > 1 + clip_high) & (advantages > 0), (ratio < 1 - clip_low) & negative
    return TokenLoss(loss, log_ratio, high, low, dual)


def weighted(tokens: Tokens, log_ratio: Tensor, *, clip_low: float, clip_high: float) -> TokenLoss:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp: the clipped ratio is a weight, and no token loses its gradient."""
    log_ratio, advantages = log_ratio.detach(), tokens.advantages
    ratio = torch.exp(log_ratio)
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    high, low = (ratio > 1 + clip_high) & (advantages > 0), (ratio < 1 - clip_low) & (advantages < 0)
    return TokenLoss(-weight * advantages * tokens.logp, log_ratio, high, low)


def kept(tokens: Tokens, loss: Tensor, keep: Tensor) -> TokenLoss:
    """`loss` [T] of the tokens that a mask `keep` [T] lets through."""
    positive = tokens.advantages > 0
    return TokenLoss(torch.where(keep, loss, 0.0), tokens.log_ratio, ~keep & positive, ~keep & ~positive)
