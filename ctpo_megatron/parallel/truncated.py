"""Log-probs under a distribution that is cut to a support: the words that sampling could have drawn (docs/truncation.md).

    logp[t] = logit[t, label] - logsumexp(logit[t, support]),      d logp / d logit = onehot - q,  q the softmax over the support

The gradient is 0 outside the support, so the backward needs no logits: it walks the vocabulary in blocks, as `vocab` does, only
to turn a few numbers per token into two matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.parallel.words import blocks_of, join, places, summarise


class TruncatedLogp(torch.autograd.Function):
    """Of each label [T], and without gradient the entropy of the whole distribution and the support's log-mass in it: [T, 2]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        used: Tensor,
        rows: int,
        group: dist.ProcessGroup | None,
        scale: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        found = summarise(hidden, weight[:rows], ids, scale, entropy)[0]
        if group is not None:
            found = join(found, group)
        kept = torch.where(used, found.picked - found.top.unsqueeze(-1), -torch.inf)
        log_kept, log_total = kept.logsumexp(-1), found.total.log()
        coefficients = torch.exp(kept - log_kept.unsqueeze(-1))
        coefficients[:, 0] -= 1.0
        ctx.save_for_backward(hidden, weight, ids, coefficients)
        ctx.scale, ctx.rows = scale, rows
        whole = torch.stack([log_total - found.weighted / found.total, log_kept - log_total], -1)
        ctx.mark_non_differentiable(whole)
        return kept[:, 0] - log_kept, whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_whole: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, coefficients = ctx.saved_tensors
        scaled = coefficients * (-ctx.scale * grad.float()).unsqueeze(-1)
        grad_hidden, grad_weight = torch.zeros(hidden.shape, device=hidden.device), torch.zeros_like(weight)
        for words in blocks_of(hidden.shape[0], ctx.rows):
            place, mine = places(ids, words)
            sparse = torch.zeros(hidden.shape[0], words.stop - words.start, device=hidden.device)
            logits = sparse.scatter_add_(-1, place, scaled * mine).to(weight.dtype)
            torch.mm(logits.t(), hidden, out=grad_weight[words])
            grad_hidden += torch.mm(logits, weight[words])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None, None


def with_labels(labels: Tensor, support_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The words of each token's support [T, 1 + K], the label first, and which of them count: what was drawn always does.

    `support_ids` [T, K] may have the label among them or not; -1 is an unused column. A token without any was not drawn by a
    policy: its label is all there is, and its log-prob 0.
    """
    ids = support_ids.to(labels.dtype)
    label = labels.unsqueeze(-1)
    used = torch.cat([torch.ones_like(label, dtype=torch.bool), (ids >= 0) & (ids != label)], -1)
    return torch.cat([label, ids], -1), used
