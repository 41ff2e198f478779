"""Two policies over a tree of prefixes small enough to sum over every sequence: expectations without sampling, in float64.

A policy is a table of logits, one row per prefix. Rows are numbered breadth first: the prefix of t tokens whose digits in base
`vocab` spell k has row (vocab**t - 1) / (vocab - 1) + k. Sequences all have `horizon` tokens; one that ends earlier is written
with a `mask` that leaves out what follows, whose probabilities then sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ctpo_megatron.algorithms import LocalScan, policy_loss

WORLDS = [(2, 3, 0), (2, 7, 1), (3, 4, 2), (3, 6, 3), (4, 4, 4)]  # words, tokens, seed of `random_policies`
VISIBLE = 1e-3  # numbers that differ by more than this differ: nine orders above the rounding of a sum


def close(a: Tensor | float, b: Tensor | float, atol: float = 1e-12) -> None:
    """Assert equality up to `atol`."""
    a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (a, b))
    torch.testing.assert_close(a, b, rtol=0.0, atol=atol)


@dataclass(frozen=True)
class Policies:
    """A behaviour policy mu and a policy pi. N sequences of T tokens from V words, S prefixes."""

    pi: Tensor  # [S, V] float64 logits
    mu: Tensor  # [S, V] float64 logits
    horizon: int

    @property
    def vocab(self) -> int:
        return self.pi.shape[1]

    @cached_property
    def tokens(self) -> Tensor:
        """[N, T] every sequence."""
        columns = [torch.arange(self.vocab)] * self.horizon
        return torch.cartesian_prod(*columns).reshape(-1, self.horizon)

    @cached_property
    def rows(self) -> Tensor:
        """[N, T] table row of the prefix before each token."""
        rows = torch.zeros_like(self.tokens)
        for t in range(1, self.horizon):  # the children of row r are r * vocab + 1 ... r * vocab + vocab
            rows[:, t] = rows[:, t - 1] * self.vocab + 1 + self.tokens[:, t - 1]
        return rows

    def logp(self, logits: Tensor) -> Tensor:
        """[N, T] log-probs of the sequences' tokens under a table of logits."""
        return self.at(torch.log_softmax(logits, dim=1))

    def at(self, table: Tensor) -> Tensor:
        """[N, T] the entries of a table [S, V] at the sequences' prefixes and tokens."""
        return table[self.rows, self.tokens]

    def prob(self, logits: Tensor) -> Tensor:
        """[N] probabilities of the sequences."""
        return self.logp(logits).sum(1).exp()

    @cached_property
    def log_ratio(self) -> Tensor:
        """[N, T] log pi/mu of each token."""
        return self.logp(self.pi) - self.logp(self.mu)

    @cached_property
    def score(self) -> Tensor:
        """[N, T, V] gradient of each token's log pi with respect to its own row of logits; it is zero in every other row."""
        return torch.eye(self.vocab, dtype=torch.float64)[self.tokens] - torch.softmax(self.pi, 1)[self.rows]

    def gradient(self, weights: Tensor, under: Tensor) -> Tensor:
        """[S, V] the expectation of sum_t weights[t] grad log pi_t over sequences drawn from the logits `under`."""
        terms = (self.prob(under)[:, None] * weights).unsqueeze(2) * self.score
        return torch.zeros_like(self.pi).index_add(0, self.rows.flatten(), terms.flatten(0, 1))

    def variance(self, weights: Tensor) -> float:
        """Trace of the covariance of sum_t weights[t] grad log pi_t of one sequence from mu.

        The tokens of one sequence have different rows, so squared norms add up over tokens.
        """
        square = (weights.square() * self.score.square().sum(2)).sum(1)
        return float(self.prob(self.mu) @ square - self.gradient(weights, self.mu).square().sum())

    def mean(self, values: Tensor) -> Tensor:
        """Expectation under mu of values [N] or [N, ...]."""
        return torch.tensordot(self.prob(self.mu), values, dims=1)


# Weights [N, T] of a token's gradient term, from the log-ratios [N, T].
RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "token": torch.exp,
    "geometric mean": lambda d: (d.cumsum(1) / torch.arange(1, d.shape[1] + 1)).exp(),
    "sequence mean": lambda d: d.mean(1, keepdim=True).exp().expand_as(d),
    "prefix minimum": lambda d: (d + exclusive_minimum(d)).exp(),
    "cumulative": lambda d: d.cumsum(1).exp(),
    "sequence": lambda d: d.sum(1, keepdim=True).exp().expand_as(d),
}


# The same weights times the advantage, as the gradient of an objective whose clipping is out of the way.
WIDE = {"clip_low": 1e6, "clip_high": 1e6}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "token": {"type": "grpo", "dual_clip": None, **WIDE},
    "geometric mean": {"type": "ctpo", "ratio": "geomean", "dual_clip": None, **WIDE},
    "sequence mean": {"type": "gspo", **WIDE},
    "prefix minimum": {"type": "minpro", **WIDE},
    "cumulative": {"type": "ctpo", "dual_clip": None, **WIDE},
    "sequence": {"type": "sequence", **WIDE},
}


def exclusive_minimum(d: Tensor) -> Tensor:
    """[N, T] the smallest log-ratio before each token; zero before the first."""
    return torch.cat([torch.zeros_like(d[:, :1]), d[:, :-1].cummin(1).values], dim=1)


def random_policies(vocab: int, horizon: int, seed: int, distance: float = 0.5) -> Policies:
    """Normal logits for mu; pi is mu plus `distance` times other normal logits."""
    generator = torch.Generator().manual_seed(seed)
    mu, change = torch.randn(2, prefixes(vocab, horizon), vocab, generator=generator, dtype=torch.float64)
    return Policies(mu + distance * change, mu, horizon)


def product_policies(pi: Tensor, mu: Tensor) -> Policies:
    """Policies whose tokens are independent: position t has the logits pi[t] and mu[t], [T, V], whatever came before."""
    horizon, vocab = pi.shape
    depth = torch.repeat_interleave(torch.arange(horizon), vocab ** torch.arange(horizon))
    return Policies(pi[depth], mu[depth], horizon)


def coins(*heads: float) -> Tensor:
    """[T, 2] logits of independent coins, for `product_policies`; word 1 is heads."""
    return torch.tensor([[math.log1p(-h), math.log(h)] for h in heads], dtype=torch.float64)


def prefixes(vocab: int, horizon: int) -> int:
    """Number of table rows."""
    return sum(vocab**t for t in range(horizon))


def action_values(policies: Policies, logits: Tensor, reward: Tensor) -> Tensor:
    """[S, V] expected terminal reward [N] of each token after each prefix, when `logits` choose the tokens after it.

    By recursion from the leaves: no ratio and no probability of a whole sequence enters.
    """
    probs = torch.softmax(logits, 1)
    levels = [reward.reshape(-1, policies.vocab)]
    for t in reversed(range(policies.horizon - 1)):
        first = prefixes(policies.vocab, t + 1)
        below = probs[first : first + levels[0].shape[0]]
        levels.insert(0, (below * levels[0]).sum(1).reshape(-1, policies.vocab))
    return torch.cat(levels)


def occupancy(policies: Policies, logits: Tensor) -> Tensor:
    """[S] probability of reaching each prefix, by recursion from the root."""
    probs = torch.softmax(logits, 1)
    levels = [torch.ones(1, dtype=torch.float64)]
    for t in range(policies.horizon - 1):
        first = prefixes(policies.vocab, t)
        levels.append((levels[-1][:, None] * probs[first : first + levels[-1].numel()]).flatten())
    return torch.cat(levels)


def tree_gradient(policies: Policies, states: Tensor, values: Tensor) -> Tensor:
    """[S, V] sum over prefixes s of states[s] * sum_a values[s, a] * grad pi(a|s): the policy gradient, without sequences."""
    probs = torch.softmax(policies.pi, 1)
    centred = values - (probs * values).sum(1, keepdim=True)
    return states[:, None] * probs * centred


def true_gradient(policies: Policies, reward: Tensor) -> Tensor:
    """[S, V] gradient of pi's expected terminal reward, by differentiating the sum over all sequences."""
    logits = policies.pi.clone().requires_grad_()
    return torch.autograd.grad(policies.prob(logits) @ reward, logits)[0]


def loss_weights(
    objective: dict[str, Any],
    policies: Policies,
    advantages: Tensor,
    mask: Tensor | None = None,
    old: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """[N, T] what `policy_loss` multiplies the gradient of each token's log-prob by, all sequences in one pack.

    `old` are the logits [S, V] of the policy that ratios are taken against; None: mu, which is also the rollout policy.
    """
    count, horizon = policies.tokens.shape
    logp = policies.logp(policies.pi).flatten().requires_grad_()
    out = policy_loss(
        objective,
        logp=logp,
        old_logp=policies.logp(policies.mu if old is None else old).flatten(),
        rollout_logp=policies.logp(policies.mu).flatten(),
        advantages=advantages.expand(count, horizon).flatten(),
        mask=torch.ones(count * horizon, dtype=torch.bool) if mask is None else mask.flatten(),
        cu_seqlens=torch.arange(count + 1) * horizon,
        **{"aggregation": "sequence-sum", "normalizer": 1.0, "scan": LocalScan(exact=False), **options},
    )
    return -torch.autograd.grad(out.loss, logp)[0].reshape(count, horizon)


def coin_log_ratio(sigma: float, tokens: int) -> tuple[Tensor, Tensor]:
    """Log-ratio of `tokens` independent coins and its probabilities under mu, [tokens + 1] each: the count of heads decides.

    mu tosses a fair coin, pi one whose heads have probability (1 + tanh sigma) / 2. A token's log-ratio is then
    +-sigma - log cosh sigma: standard deviation sigma, mean -log cosh sigma.
    """
    heads = torch.arange(tokens + 1, dtype=torch.float64)
    tails = tokens - heads
    log_ratio = sigma * (heads - tails) - tokens * math.log(math.cosh(sigma))
    log_prob = math.lgamma(tokens + 1) - torch.lgamma(heads + 1) - torch.lgamma(tails + 1) - tokens * math.log(2)
    return log_ratio, log_prob.exp()
