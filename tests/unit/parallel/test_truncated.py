"""Log-probs under a distribution that is cut to a support, against torch's log_softmax of the logits that are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctpo_megatron.parallel import vocab_parallel_logp, words
from tests.unit.parallel.test_vocab import TOKENS, WORDS, Case, case


def supports(c: Case, width: int = 6) -> Tensor:
    """[T, width] ids and unused columns; some rows have the label among them, the last row is empty."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randperm(WORDS - 3, generator=generator)[:width] for _ in range(TOKENS)])
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    ids = torch.where(ids == c.labels[:, None], -1, ids)
    ids[::2, 2] = c.labels[::2]
    ids[-1] = -1
    return ids.int()


def naive(c: Case, ids: Tensor, temperature: float, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, masses and both gradients by autograd from all logits, those outside of the support taken away."""
    hidden, weight = c.hidden.detach().clone().requires_grad_(), c.weight.detach().clone().requires_grad_()
    logits = (hidden @ weight[:count].t()).float() / temperature
    inside = torch.zeros(logits.shape, dtype=torch.bool)
    for t, row in enumerate(ids.tolist()):
        inside[t, [int(c.labels[t]), *(word for word in row if word >= 0)]] = True
    cut = torch.log_softmax(logits.masked_fill(~inside, -torch.inf), -1)
    picked = cut.gather(-1, c.labels[:, None]).squeeze(-1)
    (picked * c.upstream).sum().backward()
    mass = (torch.softmax(logits, -1) * inside).sum(-1)
    return picked.detach(), mass.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("block", [1, 200 * TOKENS, 2**23])
@pytest.mark.parametrize(("temperature", "count"), [(1.0, WORDS), (0.7, WORDS - 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_log_softmax_of_the_logits_that_are_left(
    monkeypatch: pytest.MonkeyPatch, block: int, temperature: float, count: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(words, "BLOCK", block)
    c = case(dtype)
    c = c._replace(labels=c.labels.clamp(max=WORDS - 4))
    ids = supports(c)
    found = vocab_parallel_logp(c.hidden, c.weight, c.labels, temperature=temperature, vocab_size=count, support_ids=ids)
    (found.logp * c.upstream).sum().backward()
    logp, mass, grad_hidden, grad_weight = naive(c, ids, temperature, count)
    torch.testing.assert_close(found.logp, logp, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(found.support_mass, mass, atol=2e-4, rtol=2e-3 if dtype == torch.bfloat16 else 1e-4)
    whole = vocab_parallel_logp(c.hidden, c.weight, c.labels, temperature=temperature, vocab_size=count)
    torch.testing.assert_close(found.entropy, whole.entropy)
    for ours, theirs in ((c.hidden.grad, grad_hidden), (c.weight.grad, grad_weight)):
        assert ours.dtype == dtype
        error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error < (2e-5 if dtype == torch.float32 else 1e-2)


def test_a_token_that_no_policy_drew_is_certain_and_has_no_gradient() -> None:
    c = case(torch.float32)
    found = vocab_parallel_logp(c.hidden, c.weight, c.labels, support_ids=torch.full((TOKENS, 3), -1))
    found.logp.sum().backward()
    assert not found.logp.any()
    assert not c.hidden.grad.any()
    assert not c.weight.grad.any()


def test_the_whole_vocabulary_as_support_is_no_truncation() -> None:
    c = case(torch.float32)
    everything = torch.arange(WORDS).expand(TOKENS, -1)
    found = vocab_parallel_logp(c.hidden, c.weight, c.labels, support_ids=everything)
    torch.testing.assert_close(found.logp, vocab_parallel_logp(c.hidden, c.weight, c.labels).logp, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.support_mass, torch.ones(TOKENS))


def test_top_k_words_of_a_truncated_distribution_are_refused() -> None:
    c = case(torch.float32)
    with pytest.raises(ValueError, match="whole distributions"):
        vocab_parallel_logp(c.hidden, c.weight, c.labels, top_k_ids=c.support, support_ids=c.support)
