"""Log-probs of labels against torch's log_softmax, however the tokens are cut into blocks."""

from __future__ import annotations

import pytest
import torch

from ctpo_megatron.parallel import vocab, vocab_parallel_logp

TOKENS, WORDS = 37, 53


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(TOKENS, WORDS, generator=generator)
    logits[0, 5] = 200.0  # exp would overflow
    return (
        logits.to(dtype).requires_grad_(),
        torch.randint(0, WORDS, (TOKENS,), generator=generator),
        torch.randn(TOKENS, generator=generator),
    )


@pytest.mark.parametrize("block", [1, 4 * WORDS, TOKENS * WORDS, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_log_softmax(monkeypatch, block, temperature, dtype):
    monkeypatch.setattr(vocab, "BLOCK", block)
    logits, labels, weights = inputs(dtype)
    logp, entropy = vocab_parallel_logp(logits, labels, temperature=temperature)
    (logp * weights).sum().backward()
    again = logits.detach().clone().requires_grad_()
    expected = torch.log_softmax(again.float() / temperature, dim=-1)
    (expected.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * weights).sum().backward()
    torch.testing.assert_close(logp, expected.gather(-1, labels.unsqueeze(-1)).squeeze(-1), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), atol=2e-5, rtol=1e-5)
    assert not entropy.requires_grad
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, again.grad, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-5)


def test_blocks_do_not_change_a_bit_and_leave_the_logits_alone(monkeypatch):
    logits, labels, _ = inputs(torch.float32)
    before = logits.detach().clone()
    whole, entropy = vocab_parallel_logp(logits, labels, temperature=0.7)
    monkeypatch.setattr(vocab, "BLOCK", 3 * WORDS)
    parts, entropy_of_parts = vocab_parallel_logp(logits, labels, temperature=0.7)
    assert torch.equal(whole, parts)
    assert torch.equal(entropy, entropy_of_parts)
    assert torch.equal(logits, before)


def test_padding_words_do_not_count():
    logits, labels, _ = inputs(torch.float32)
    labels = labels.clamp(max=WORDS - 4)
    logp, entropy = vocab_parallel_logp(logits, labels, vocab_size=WORDS - 3)
    logp.sum().backward()
    short = logits.detach()[:, : WORDS - 3].clone().requires_grad_()
    expected, its_entropy = vocab_parallel_logp(short, labels)
    expected.sum().backward()
    assert torch.equal(logp, expected)
    assert torch.equal(entropy, its_entropy)
    assert torch.equal(logits.grad, torch.nn.functional.pad(short.grad, (0, 3)))


def test_no_float32_copy_of_all_logits_is_kept(monkeypatch):
    monkeypatch.setattr(vocab, "BLOCK", 4 * WORDS)
    sizes: list[int] = []
    logits, labels, _ = inputs(torch.bfloat16)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float32:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        vocab_parallel_logp(logits, labels)
    assert sizes
    assert max(sizes) == TOKENS
