"""Log-probs of labels when each tensor-parallel rank holds a slice of the vocabulary's logits.

Logits are the largest tensor of a step: a pack of 16,384 tokens over 152,000 words takes 5 GB in bfloat16 and 10 in float32. So
they are looked at some tokens at a time, in float32, and looked at again in the backward; only sums per token are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 2**24  # float32 numbers held at once: 64 MiB


class _VocabParallelLogp(torch.autograd.Function):
    """logp[t] = logit[t, label] - logsumexp(logits[t]); backward: grad * (onehot - softmax), local to each rank."""

    @staticmethod
    def forward(
        ctx, logits_TV: Tensor, labels_T: Tensor, first: int, group: dist.ProcessGroup | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        top = torch.cat([block.amax(dim=-1) for _, block in _blocks(logits_TV, temperature)])
        if group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        local = labels_T - first
        mine = (local >= 0) & (local < logits_TV.shape[-1])
        local = torch.where(mine, local, 0)
        sums = torch.stack([torch.zeros_like(top)] * 3)  # of the label's logit, of exp(logits), of logits * exp(logits)
        for part, block in _blocks(logits_TV, temperature):
            block -= top[part].unsqueeze(-1)
            sums[0, part] = torch.where(mine[part], block.gather(-1, local[part].unsqueeze(-1)).squeeze(-1), 0.0)
            weights = torch.exp(block)
            sums[1, part] = weights.sum(-1)
            sums[2, part] = weights.mul_(block).sum(-1)
        if group is not None:
            dist.all_reduce(sums, group=group)
        picked, partition, weighted = sums
        log_partition = partition.log()
        ctx.save_for_backward(logits_TV, local, mine, top + log_partition)
        ctx.temperature = temperature
        entropy = log_partition - weighted / partition
        ctx.mark_non_differentiable(entropy)
        return picked - log_partition, entropy

    @staticmethod
    def backward(ctx, grad_T: Tensor, _grad_entropy: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_TV, local, mine, log_total = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for part, block in _blocks(logits_TV, ctx.temperature):
            scale = grad_T[part].float() / ctx.temperature
            grad = block.sub_(log_total[part].unsqueeze(-1)).exp_().mul_(-scale.unsqueeze(-1))
            own = torch.where(mine[part], scale, 0.0).unsqueeze(-1)
            grad_TV[part] = grad.scatter_add_(-1, local[part].unsqueeze(-1), own).to(grad_TV.dtype)
        return grad_TV, None, None, None, None


def _blocks(logits_TV: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens at a time: which, and their logits / temperature as a float32 copy [t, V]."""
    tokens, words = logits_TV.shape
    step = max(1, BLOCK // max(words, 1))
    for begin in range(0, max(tokens, 1), step):
        part = slice(begin, begin + step)
        block = logits_TV[part].to(torch.float32, copy=True)
        yield part, block if temperature == 1.0 else block.div_(temperature)


def vocab_parallel_logp(
    logits_TV: Tensor,
    labels_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label [T] float32 (with grad) and the entropy [T] (without), at the sampling temperature.

    `logits_TV` [T, V / tp] is this rank's slice of the vocabulary; `group` is the tensor-parallel group, None for one rank. Words
    from `vocab_size` on only make the vocabulary divisible and do not count; None: all do.
    """
    if group is not None and group.size() == 1:
        group = None
    first = 0 if group is None else group.rank() * logits_TV.shape[-1]
    if vocab_size is not None:
        if first >= vocab_size:
            raise ValueError(
                f"all words of tensor-parallel rank {group.rank()} are padding: {vocab_size} words; use a smaller tp"
            )
        logits_TV = logits_TV[:, : vocab_size - first]
    return _VocabParallelLogp.apply(logits_TV, labels_T, first, group, temperature)
