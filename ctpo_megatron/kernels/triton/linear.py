"""Log-probs and entropy of labels from hidden states and the output matrix: the logits never leave a GPU's registers.

The forward walks the vocabulary tile by tile with a running largest logit and sums, as `parallel.words.summarise` does. The
backward computes softmax - onehot for some words at a time, and leaves the two products with it to torch: no atomic sums, so a
gradient has the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, WORDS, WIDTH = 64, 64, 32  # of a tile
HELD = 2**23  # numbers of softmax - onehot that are held at once
_LEAST = torch.finfo(torch.float32).min


@triton.jit
def _logits(
    hidden, weight, t, w, tokens, words, width, TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr
):
    """hidden[t] @ weight[w].T [TOKENS, WORDS] float32."""
    found = tl.zeros([TOKENS, WORDS], tl.float32)
    for at in range(0, width, WIDTH):
        c = at + tl.arange(0, WIDTH)
        rows = tl.load(hidden + t[:, None] * width + c[None, :], mask=(t[:, None] < tokens) & (c[None, :] < width), other=0.0)
        columns = tl.load(weight + w[None, :] * width + c[:, None], mask=(w[None, :] < words) & (c[:, None] < width), other=0.0)
        if WIDE:
            rows, columns = rows.to(tl.float32), columns.to(tl.float32)
        found += tl.dot(rows, columns, input_precision="ieee")
    return found


@triton.jit
def _forward(
    hidden, weight, labels, logp, entropy, log_sum, tokens, words, width, scale, least,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    label = tl.load(labels + t, mask=t < tokens, other=-1)
    top = tl.zeros([TOKENS], tl.float32) + least
    total = tl.zeros([TOKENS], tl.float32)
    weighted = tl.zeros([TOKENS], tl.float32)
    picked = tl.zeros([TOKENS], tl.float32)
    for first in range(0, words, WORDS):
        w = (first + tl.arange(0, WORDS)).to(tl.int64)
        logit = _logits(hidden, weight, t, w, tokens, words, width, TOKENS, WORDS, WIDTH, WIDE) * scale
        inside = (w < words)[None, :]
        picked += tl.sum(tl.where(inside & (w[None, :] == label[:, None]), logit, 0.0), 1)
        now = tl.maximum(top, tl.max(tl.where(inside, logit, least), 1))
        shift = top - now
        shrink = tl.exp(shift)
        shifted = logit - now[:, None]
        weights = tl.where(inside, tl.exp(shifted), 0.0)
        weighted = (weighted + total * shift) * shrink + tl.sum(tl.where(inside, weights * shifted, 0.0), 1)
        total = total * shrink + tl.sum(weights, 1)
        top = now
    log_total = tl.log(total)
    tl.store(logp + t, picked - top - log_total, mask=t < tokens)
    tl.store(entropy + t, log_total - weighted / total, mask=t < tokens)
    tl.store(log_sum + t, top + log_total, mask=t < tokens)


@triton.jit
def _difference(
    hidden, weight, labels, log_sum, out, tokens, words, width, scale, first,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    w = (tl.program_id(1) * WORDS + tl.arange(0, WORDS)).to(tl.int64)
    logit = _logits(hidden, weight, t, w, tokens, words, width, TOKENS, WORDS, WIDTH, WIDE) * scale
    label = tl.load(labels + t, mask=t < tokens, other=-1) - first
    softmax = tl.exp(logit - tl.load(log_sum + t, mask=t < tokens, other=0.0)[:, None])
    found = softmax - tl.where(w[None, :] == label[:, None], 1.0, 0.0)
    at = out + t[:, None] * words + w[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=(t[:, None] < tokens) & (w[None, :] < words))


def _interpreted() -> bool:
    """Whether factors are to be made float32 first: the interpreter of Triton 3.8 multiplies the bits of bfloat16 as integers."""
    return bool(triton.knobs.runtime.interpret)


class LinearLogp(torch.autograd.Function):
    """(hidden [T, H], weight [V, H], labels [T] int64, scale) -> log-prob of each label and entropy, [T] float32 each.

    The entropy is without gradient. Hidden states and weight are contiguous, of one number format: float32, bfloat16 or float16.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        tokens, (words, width) = len(hidden), weight.shape
        logp, entropy, log_sum = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(3))
        if tokens:
            _forward[(triton.cdiv(tokens, TOKENS),)](
                hidden, weight, labels, logp, entropy, log_sum, tokens, words, width, scale, _LEAST,
                TOKENS=TOKENS, WORDS=WORDS, WIDTH=WIDTH, WIDE=_interpreted(),
            )  # fmt: skip
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        ctx.scale = scale
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum = ctx.saved_tensors
        tokens, (words, width) = len(hidden), weight.shape
        factor = (-ctx.scale * grad.float()).unsqueeze(-1)
        scaled = hidden * factor.to(hidden.dtype)
        grad_hidden, grad_weight = torch.zeros(hidden.shape, device=hidden.device), torch.zeros_like(weight)
        step = max(WORDS, HELD // max(tokens, 1)) if tokens else words
        for first in range(0, words if tokens else 0, step):
            part = weight[first : first + step]
            difference = torch.empty(tokens, len(part), dtype=weight.dtype, device=weight.device)
            _difference[(triton.cdiv(tokens, TOKENS), triton.cdiv(len(part), WORDS))](
                hidden, part, labels, log_sum, difference, tokens, len(part), width, ctx.scale, first,
                TOKENS=TOKENS, WORDS=WORDS, WIDTH=WIDTH, WIDE=_interpreted(),
            )  # fmt: skip
            torch.mm(difference.t(), scaled, out=grad_weight[first : first + step])
            grad_hidden += torch.mm(difference, part)
        return grad_hidden.mul_(factor).to(hidden.dtype), grad_weight, None, None


def linear_logp(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each label with grad, and each token's entropy without: [T] float32. See `LinearLogp`."""
    logp, entropy = LinearLogp.apply(hidden.contiguous(), weight.contiguous(), labels, 1.0 / temperature)
    return logp, entropy
