"""How much the gradient of single tokens varies under different importance ratios; `tools/variance_probe.py` measures it.

The gradient is that of the output layer W [V, H]. For token a at position t of trajectory i, with probabilities p at
temperature T and last hidden state h, it is

    g_it = w_it A_i (onehot(a) - p) h^T / T,

where w is the ratio and A the advantage. A product of two vectors: so the inner product of two gradients is a product of two
short inner products, and neither a backward pass nor a V x H matrix is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctpo_megatron.algorithms.loss import policy_loss
from ctpo_megatron.algorithms.operators import MAX_ABS
from ctpo_megatron.errors import NonFiniteError

ESTIMATORS = ("token", "cumulative", "geometric mean", "full sequence", "cumulative, clipped")


def prefix_log_ratios(new_logp: Tensor, old_logp: Tensor, lengths: Tensor) -> Tensor:
    """Sum of log-ratios from a trajectory's first token to each: [M], over N packed trajectories of `lengths` [N].

    Each token's log-ratio is clamped to +-20 first, as in every objective.
    """
    log_ratio = (new_logp - old_logp).clamp(-MAX_ABS, MAX_ABS)
    return torch.cat([part.cumsum(0) for part in log_ratio.split(lengths.tolist())])


def gradient_scales(new_logp: Tensor, old_logp: Tensor, advantages: Tensor, lengths: Tensor, clipped: Any) -> Tensor:
    """What multiplies the gradient of each token's log-prob: [E, M] float64, in the order of ESTIMATORS.

    That is ratio times advantage, where a token's gradient comes through its own log-prob alone. Arguments are the packed policy
    tokens [M] of N trajectories of `lengths` [N], without prompt and tool tokens. The first four ratios are not clipped: of the
    token; CTPO's product up to the token (arXiv 2605.07331) and its geometric mean; the product over the whole trajectory.
    `clipped` is the objective (config or mapping) that makes the last row.

    Raises NonFiniteError where the policies are too far apart for float64.
    """
    new_logp, old_logp, advantages = new_logp.double(), old_logp.double(), advantages.double()
    log_ratio = (new_logp - old_logp).clamp(-MAX_ABS, MAX_ABS)
    prefix = prefix_log_ratios(new_logp, old_logp, lengths)
    position = torch.cat([torch.arange(1, length + 1) for length in lengths.tolist()])
    total = prefix[lengths.cumsum(0) - 1].repeat_interleave(lengths)
    plain = torch.exp(torch.stack([log_ratio, prefix, prefix / position, total])) * advantages
    logp = new_logp.clone().requires_grad_()
    loss = policy_loss(
        clipped,
        logp=logp,
        old_logp=old_logp,
        advantages=advantages,
        mask=torch.ones_like(advantages, dtype=torch.bool),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        aggregation="sequence-sum",
        normalizer=1.0,
    ).loss
    scales = torch.cat([plain, -torch.autograd.grad(loss, logp)[0][None]])
    if not torch.isfinite(scales).all():
        farthest = float(total.abs().max())
        raise NonFiniteError(f"ratios overflow: the log-ratio of a whole trajectory reaches {farthest:.0f}; take closer policies")
    return scales


@torch.no_grad()
def gradient_kernel(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
    """Inner products [n, n] float64 of the gradients of n log-probs, `scales` aside.

    `hidden` [n, H] are the last hidden states, `labels` [n] the tokens, `head` the output layer, [n, H] -> [n, V].
    """
    error = torch.softmax(head(hidden).double() / temperature, -1).neg_()
    error[torch.arange(len(labels), device=labels.device), labels] += 1.0
    hidden = hidden.double()
    return (error @ error.T) * (hidden @ hidden.T) / temperature**2


def scatter(kernel: Tensor, scales: Tensor, prompt: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of n gradients from their mean, summed: [E, B]; and their number less one: [B].

    Gradient i of estimator e is `scales[e, i]` times number i of those behind `kernel` [n, n], of the prompt `prompt[i]`.
    `draws` [B, P] says how often each prompt is taken. The two results add up over positions; their quotient is the trace of the
    gradients' covariance.
    """
    prompts = draws.shape[1]
    empty = draws.new_zeros(prompts, len(prompt))
    count = draws @ draws.new_zeros(prompts).index_add_(0, prompt, torch.ones_like(prompt, dtype=draws.dtype))
    found = []
    for scale in scales:
        products = scale[:, None] * kernel * scale
        within = draws.new_zeros(prompts).index_add_(0, prompt, products.diagonal())  # squared norms, by prompt
        between = draws.new_zeros(prompts, prompts).index_add_(1, prompt, empty.index_add(0, prompt, products))
        found.append(draws @ within - ((draws @ between) * draws).sum(-1) / count.clamp(min=1))
    return torch.stack(found), (count - 1).clamp(min=0)


def bootstrap_draws(prompts: int, resamples: int, seed: int) -> Tensor:
    """How often each prompt is drawn: [1 + resamples, prompts] float64. The first row is the sample itself."""
    picks = torch.randint(prompts, (resamples, prompts), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, prompts).scatter_add_(1, picks, torch.ones(picks.shape))
    return torch.cat([torch.ones(1, prompts), counts]).double()


def intervals(variance: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """95 % intervals of what `draws` made of each estimator's variance [E, B].

    `variance`: of itself; `relative`: of its ratio to the first estimator's, both of one draw. Each estimator has `value`, `low`
    and `high`. Draws without any gradient are NaN and are left out.
    """
    found = {}
    for key, values in (("variance", variance), ("relative", variance / variance[:1])):
        edges = torch.nanquantile(values[:, 1:], values.new_tensor([0.025, 0.975]), dim=1)
        rows = torch.stack([values[:, 0], *edges], 1).tolist()
        named = ({"value": value, "low": low, "high": high} for value, low, high in rows)
        found[key] = dict(zip(ESTIMATORS, named, strict=True))
    return found


def effective_number(weights: Tensor) -> float:
    """Of how many equal ones non-negative `weights` [n] are worth: (sum w)^2 / sum w^2 (Kish's effective sample size)."""
    return float(weights.sum().square() / weights.square().sum())


@dataclass(frozen=True)
class Bin:
    """Positions `first` to `last`, and those of them that are looked at."""

    first: int
    last: int
    positions: list[int]


def position_bins(longest: int, most: int) -> list[Bin]:
    """Bin b holds positions 2**b to 2**(b+1) - 1, as drift/* of a run does; at most `most` of each, evenly spread."""
    edges = [(2**b, min(2 ** (b + 1) - 1, longest)) for b in range(longest.bit_length())]
    spread = [torch.linspace(first, last, min(most, last - first + 1)).round().long().tolist() for first, last in edges]
    return [Bin(first, last, positions) for (first, last), positions in zip(edges, spread, strict=True)]


def last_position(position: Tensor, prompt: Tensor, least: int) -> int:
    """The last of the tokens' `position` [M] that is reached by `least` of the prompts [M]; 0 where there are not so many."""
    longest = torch.zeros(int(prompt.max()) + 1, dtype=torch.int64).scatter_reduce_(0, prompt, position, "amax")
    return int(longest.sort(descending=True).values[least - 1]) if len(longest) >= least else 0
