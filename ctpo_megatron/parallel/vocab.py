"""Log-probs of labels when each tensor-parallel rank holds a slice of the vocabulary's logits."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogp(torch.autograd.Function):
    """logp[t] = logit[t, label] - logsumexp(logits[t]); backward: grad * (onehot - softmax), local to each rank."""

    @staticmethod
    def forward(ctx, logits_TV: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        logits = logits_TV.float()
        top = logits.amax(dim=-1)
        if group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        weights = torch.exp(logits - top.unsqueeze(-1))
        local = labels_T - first
        mine = (local >= 0) & (local < logits.shape[-1])
        local = torch.where(mine, local, 0)
        picked = torch.where(mine, logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) - top, 0.0)
        mean_terms = weights * (logits - top.unsqueeze(-1))
        sums = torch.stack([picked, weights.sum(-1), mean_terms.sum(-1)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        picked, partition, weighted = sums
        weights /= partition.unsqueeze(-1)
        ctx.save_for_backward(weights, local, mine)
        ctx.dtype = logits_TV.dtype
        entropy = partition.log() - weighted / partition
        ctx.mark_non_differentiable(entropy)
        return picked - partition.log(), entropy

    @staticmethod
    def backward(ctx, grad_T: Tensor, _grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        probs, local, mine = ctx.saved_tensors
        grad = probs * -grad_T.unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), torch.where(mine, grad_T, 0.0).unsqueeze(-1).to(grad.dtype))
        return grad.to(ctx.dtype), None, None, None


def vocab_parallel_logp(
    logits_TV: Tensor, labels_T: Tensor, *, group: dist.ProcessGroup | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label [T] float32 (with grad) and the entropy [T] (without), at the sampling temperature.

    `logits_TV` [T, V / tp] is this rank's slice of the vocabulary; `group` is the tensor-parallel group, None for one rank.
    """
    if group is not None and group.size() == 1:
        group = None
    first = 0 if group is None else group.rank() * logits_TV.shape[-1]
    if temperature != 1.0:
        logits_TV = logits_TV / temperature
    return _VocabParallelLogp.apply(logits_TV, labels_T, first, group)
