"""Log-probs of words from hidden states and the output matrix, without the logits of more than some words at a time.

Logits are the largest tensor of a step: a micro-batch of 4,096 tokens over 151,936 words takes 2.5 GB in float32, several times
over in autograd. So the vocabulary is walked block by block. The forward keeps, per token, the largest logit, the sum of
exponentials and what entropy needs, as flash attention does (arXiv 2205.14135); the backward computes each block again but the
last, which is still there, and the only one of a small vocabulary. A block writes its rows of the weight's gradient once and
whole. Products are in the model's number format, sums and exponentials in float32.

Under tensor parallelism each rank walks its slice of the vocabulary, and one all-gather of a few numbers per token joins them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ctpo_megatron.kernels.cpu.linear import product, sum_of_products, takes
from ctpo_megatron.parallel.truncated import TruncatedLogp, with_labels
from ctpo_megatron.parallel.words import BLOCK, blocks, in_float, join, places, summarise


class WordLogp(NamedTuple):
    """What `vocab_parallel_logp` finds, float32."""

    logp: Tensor  # [T] with grad, of each label
    entropy: Tensor | None  # [T], of each token's distribution
    top_k_logp: Tensor | None  # [T, K], of the words that were asked for
    support_mass: Tensor | None = None  # [T], probability of the support in the whole distribution, where one was given


class _VocabParallelLogp(torch.autograd.Function):
    """logp[t] = logit[t, label] - logsumexp(logits[t]); backward: grad * (onehot - softmax), local to each rank."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        rows: int,
        group: dist.ProcessGroup | None,
        scale: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        found, kept = summarise(hidden, weight[:rows], ids, scale, entropy, keep=any(ctx.needs_input_grad))
        if group is not None:
            found = join(found, group)
        log_total = found.total.log()
        logp = found.picked - (found.top + log_total).unsqueeze(-1)
        # by way of the largest logit, which is closer to the label's than the sum's logarithm: one rounding less
        logp[:, 0] = found.picked[:, 0] - found.top - log_total
        log_sum = found.top + log_total
        blocks_kept = (each for block in kept for each in (block.shifted, block.top - log_sum))
        ctx.save_for_backward(hidden, weight, ids[:, 0].clone(), log_sum, *blocks_kept)
        ctx.scale, ctx.rows, ctx.kept_from = scale, rows, [block.first for block in kept]
        label_logp, others = logp[:, 0].clone(), torch.cat([(log_total - found.weighted / found.total)[:, None], logp[:, 1:]], 1)
        ctx.mark_non_differentiable(others)
        return label_logp, others

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_others: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum, *kept = ctx.saved_tensors
        # grad * scale factors out of softmax - onehot, so only [T, H] tensors are multiplied by it
        factor = (-ctx.scale * grad.float()).unsqueeze(-1)
        scaled_hidden = hidden * factor.to(hidden.dtype)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.rows :] = 0
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        part = torch.empty_like(hidden)

        def add(words: slice, softmax: Tensor, room: Tensor) -> None:
            """`room`: memory for the block in the weight's number format; `softmax` where that is float32."""
            place, mine = places(labels.unsqueeze(-1), words)
            difference = softmax.scatter_add_(-1, place, -mine.to(softmax.dtype))
            if room is not softmax:
                difference = room.copy_(difference)
            if takes(difference, weight[words].t()) and grad_weight[words].numel() <= 4 * BLOCK:  # new tensors
                grad_weight[words] = sum_of_products(difference, scaled_hidden)
                grad_hidden.add_(product(difference, weight[words].t()))
            else:
                torch.mm(difference.t(), scaled_hidden, out=grad_weight[words])
                grad_hidden.add_(torch.mm(difference, weight[words], out=part))

        for first, shifted, shift in zip(ctx.kept_from, kept[::2], kept[1::2], strict=True):  # also of no tokens: zeros
            softmax = shifted.add_(shift.unsqueeze(-1)).exp_()  # in place: torch refuses a second backward
            room = softmax if weight.dtype == torch.float32 else torch.empty_like(softmax, dtype=weight.dtype)
            add(slice(first, first + shifted.shape[1]), softmax, room)
        first_kept = ctx.kept_from[0] if ctx.kept_from else ctx.rows
        for words, logits, buffer in blocks(hidden, weight[:first_kept]):
            shifted = torch.add(-log_sum.unsqueeze(-1), in_float(logits, buffer), alpha=ctx.scale, out=buffer)
            add(words, shifted.exp_(), logits)
        return grad_hidden.mul_(factor).to(hidden.dtype), grad_weight, None, None, None, None, None


def vocab_parallel_logp(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy: bool = True,
    top_k_ids: Tensor | None = None,
    support_ids: Tensor | None = None,
) -> WordLogp:
    """Log-prob of each label, with grad, at the sampling temperature; entropy and other words' log-probs without.

    Args:
        hidden_TH: [T, H], the last layer's output after its norm, the same on all ranks of `group`. Its gradient is this rank's
            part; the layer that made the ranks' copies sums it over them.
        weight_VH: [V / tp, H], this rank's rows of the output matrix, of the same dtype.
        labels_T: [T] int64 words.
        group: the tensor-parallel group; None for one rank.
        vocab_size: words from here on only make the vocabulary divisible and do not count; None: all count.
        entropy: whether to find it.
        top_k_ids: [T, K] int, the words whose log-probs are wanted besides the labels'.
        support_ids: [T, K] int, the words that truncated sampling could have drawn, -1: an unused column; then log-probs are of
            the distribution cut to these and the label (`truncated.TruncatedLogp`), while the entropy stays that of the whole.

    Raises ValueError where all of a rank's words are padding, and for top-k words beside supports.
    """
    if group is not None and group.size() == 1:
        group = None
    rows = weight_VH.shape[0]
    first = 0 if group is None else group.rank() * rows
    if vocab_size is not None and first >= vocab_size:
        raise ValueError(f"all words of tensor-parallel rank {first // rows} are padding: {vocab_size} words; use a smaller tp")
    used = rows if vocab_size is None else min(rows, vocab_size - first)
    if support_ids is not None:
        if top_k_ids is not None:
            raise ValueError("top-k words are of whole distributions; log-probs are wanted of truncated ones")
        words, counted = with_labels(labels_T, support_ids)
        cut, whole = TruncatedLogp.apply(hidden_TH, weight_VH, words - first, counted, used, group, 1.0 / temperature, entropy)
        return WordLogp(cut, whole[:, 0] if entropy else None, None, whole[:, 1].exp())
    ids = labels_T.unsqueeze(-1)
    if top_k_ids is not None:
        ids = torch.cat([ids, top_k_ids.to(ids.dtype)], dim=-1)
    logp, others = _VocabParallelLogp.apply(hidden_TH, weight_VH, ids - first, used, group, 1.0 / temperature, entropy)
    return WordLogp(logp, others[:, 0] if entropy else None, None if top_k_ids is None else others[:, 1:])
