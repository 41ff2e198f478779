"""Log-probs of words against torch's log_softmax of all logits, however the vocabulary is cut into blocks."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ctpo_megatron.kernels.cpu import linear
from ctpo_megatron.parallel import vocab_parallel_logp, words

TOKENS, WIDTH, WORDS = 37, 24, 531


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor
    support: Tensor


def case(dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(WORDS, WIDTH, generator=generator)
    weight[5] = 40 * hidden[0]  # exp of this word's logit would overflow
    return Case(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.randint(0, WORDS, (TOKENS,), generator=generator),
        torch.randn(TOKENS, generator=generator),
        torch.randint(0, WORDS, (TOKENS, 4), generator=generator),
    )


def naive(c: Case, temperature: float, words: int = WORDS) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropies, log-probs of the support and both gradients by autograd from all logits."""
    hidden, weight = c.hidden.detach().clone().requires_grad_(), c.weight.detach().clone().requires_grad_()
    logp = torch.log_softmax((hidden @ weight[:words].t()).float() / temperature, dim=-1)
    picked = logp.gather(-1, c.labels.unsqueeze(-1)).squeeze(-1)
    (picked * c.upstream).sum().backward()
    entropy = -(logp.exp() * logp).sum(-1)
    return picked.detach(), entropy.detach(), logp.gather(-1, c.support).detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("block", [1, 200 * TOKENS, 2**23])  # 5, 3 and 1 blocks
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onednn", [False, torch.backends.mkldnn.is_available()])
def test_like_log_softmax_of_all_logits(monkeypatch, block, temperature, dtype, onednn):
    monkeypatch.setattr(words, "BLOCK", block)
    monkeypatch.setattr(linear, "pays", lambda: onednn)
    monkeypatch.setattr(linear, "FEWEST", 1)
    c = case(dtype)
    found = vocab_parallel_logp(c.hidden, c.weight, c.labels, temperature=temperature, top_k_ids=c.support)
    (found.logp * c.upstream).sum().backward()
    logp, entropy, support_logp, grad_hidden, grad_weight = naive(c, temperature)
    torch.testing.assert_close(found.logp, logp, atol=2e-4, rtol=1e-5)  # logits go up to 900, where float32 steps are 6e-5
    torch.testing.assert_close(found.entropy, entropy, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found.top_k_logp, support_logp, atol=2e-4, rtol=1e-5)
    assert not found.entropy.requires_grad
    assert not found.top_k_logp.requires_grad
    for ours, theirs in ((c.hidden.grad, grad_hidden), (c.weight.grad, grad_weight)):
        assert ours.dtype == dtype
        scale = theirs.float().abs().max()
        error = (ours.float() - theirs.float()).abs().max() / scale
        assert error < (2e-5 if dtype == torch.float32 else 1e-2)


def test_bfloat16_gradients_of_almost_certain_tokens_are_not_rounded_away():
    """The label's entry is softmax - 1, found in float32: softmax alone would round to 1 in bfloat16."""
    hidden = torch.tensor([[1.0, 0.0]]).bfloat16().requires_grad_()
    weight = torch.tensor([[8.0, 1.0], [0.0, 0.0]]).bfloat16().requires_grad_()
    vocab_parallel_logp(hidden, weight, torch.tensor([0])).logp.sum().backward()
    rest = torch.sigmoid(torch.tensor(-8.0)).item()
    assert weight.grad[0, 0].item() == pytest.approx(rest, rel=0.01)
    assert hidden.grad[0, 0].item() == pytest.approx(8 * rest, rel=0.01)


def test_without_entropy_the_log_probs_are_the_same():
    c = case(torch.float32)
    bare = vocab_parallel_logp(c.hidden, c.weight, c.labels, entropy=False)
    assert torch.equal(bare.logp, vocab_parallel_logp(c.hidden, c.weight, c.labels).logp)
    assert bare.entropy is None
    assert bare.top_k_logp is None


def test_padding_words_do_not_count():
    c = case(torch.float32)
    c = c._replace(labels=c.labels.clamp(max=WORDS - 4), support=c.support.clamp(max=WORDS - 4))
    found = vocab_parallel_logp(c.hidden, c.weight, c.labels, vocab_size=WORDS - 3)
    (found.logp * c.upstream).sum().backward()
    logp, entropy, _, grad_hidden, grad_weight = naive(c, 1.0, WORDS - 3)
    torch.testing.assert_close(found.logp, logp, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(found.entropy, entropy, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(c.hidden.grad, grad_hidden, atol=1e-4, rtol=1e-4)
    assert not c.weight.grad[WORDS - 3 :].any()
    assert not grad_weight[WORDS - 3 :].any()


def test_nan_stays_with_its_token():
    c = case(torch.float32)
    with torch.no_grad():
        c.hidden[3] = torch.nan
    found = vocab_parallel_logp(c.hidden, c.weight, c.labels)
    bad = torch.arange(TOKENS) == 3
    assert torch.equal(found.logp.isnan(), bad)
    assert torch.equal(found.entropy.isnan(), bad)


def test_nothing_of_the_size_of_the_logits_is_kept(monkeypatch):
    monkeypatch.setattr(words, "BLOCK", 1)
    c = case(torch.bfloat16)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vocab_parallel_logp(c.hidden, c.weight, c.labels, top_k_ids=c.support)
    last = WORDS % words.FEWEST_WORDS
    assert 0 < last < WORDS / 4
    assert sorted(kept) == sorted([c.hidden.numel(), c.weight.numel(), TOKENS, TOKENS, TOKENS, TOKENS * last])


def test_a_block_that_was_kept_is_used_once():
    c = case(torch.float32)
    loss = vocab_parallel_logp(c.hidden, c.weight, c.labels).logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_rank_of_nothing_but_padding_is_refused():
    c = case(torch.float32)
    with pytest.raises(ValueError, match="are padding: 0 words"):
        vocab_parallel_logp(c.hidden, c.weight, c.labels, vocab_size=0)
