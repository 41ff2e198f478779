"""The penalty towards a reference policy: its value, and that its gradient is, in expectation, that of a KL divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ctpo_megatron.algorithms import reference_penalty

WORDS = 7


def policies() -> tuple[Tensor, Tensor]:
    """Logits of the policy, with grad, and log-probs of the reference: [WORDS], float64."""
    generator = torch.Generator().manual_seed(2)
    logits, reference = torch.randn(2, WORDS, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(-1)


def penalty(estimator: str, logp: Tensor, reference: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with the weight 1, per token, and the sum of `kl`, of one sequence."""
    mask = torch.ones(logp.numel(), dtype=torch.bool) if mask is None else mask
    bounds, ones = torch.tensor([0, logp.numel()]), torch.ones(1, dtype=torch.float64)
    out = reference_penalty(estimator, logp=logp, reference_logp=reference, mask=mask, cu_seqlens=bounds, weights=ones)
    return out.loss, out.token_loss, out.stats.means["kl"].total


@pytest.mark.parametrize(("estimator", "forward"), [("k1", True), ("k2", True), ("k3", False)])
def test_expected_gradient_is_that_of_the_divergence(estimator: str, forward: bool) -> None:
    """Every word once, weighted by its probability: the expectation over samples of the policy, exactly."""
    logits, reference = policies()
    logp = logits.log_softmax(-1)
    _, token, _ = penalty(estimator, logp, reference)
    (found,) = torch.autograd.grad((logp.exp().detach() * token).sum(), logits, retain_graph=True)
    divergence = (logp.exp() * (logp - reference)).sum() if forward else (reference.exp() * (reference - logp)).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expected_value_is_the_divergence(estimator: str) -> None:
    logits, reference = policies()
    logp = logits.log_softmax(-1)
    _, token, _ = penalty(estimator, logp, reference)
    exact = (logp.exp() * (logp - reference)).sum()
    torch.testing.assert_close((logp.exp() * token).sum(), exact, atol=1e-12, rtol=1e-10)


def test_values_by_definition_and_the_mask() -> None:
    logp = torch.tensor([-1.0, -2.0, -0.5, -30.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, torch.nan, -1.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])
    gap = [0.5, -1.0, 0.0, -10.0]  # the last one is clamped
    torch.testing.assert_close(penalty("k1", logp, reference, mask)[1].tolist(), gap)
    torch.testing.assert_close(penalty("k2", logp, reference, mask)[1].tolist(), [d * d / 2 for d in gap])
    loss, token, total = penalty("k3", logp, reference, mask)
    expected = torch.tensor([torch.exp(torch.tensor(-d)).item() - 1 + d for d in gap], dtype=torch.float64)
    torch.testing.assert_close(token, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(total, token.sum())
    loss.backward()
    slopes = [1 - 2.718281828459045**-d for d in gap[:3]]
    torch.testing.assert_close(logp.grad.tolist(), [*slopes, 0.0])  # nothing beyond the clamp


def test_weights_are_those_of_the_sequences() -> None:
    logp, reference = torch.zeros(5, requires_grad=True), torch.full((5,), -1.0)
    out = reference_penalty(
        "k1",
        logp=logp,
        reference_logp=reference,
        mask=torch.ones(5, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, 2, 5]),
        weights=torch.tensor([0.5, 2.0]),
    )
    assert out.loss.item() == pytest.approx(2 * 0.5 + 3 * 2.0)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="'k4'; allowed are k1, k2, k3"):
        penalty("k4", torch.zeros(1), torch.zeros(1))
