"""On-policy distillation against slow readings of its definitions."""

from __future__ import annotations

import math

import pytest
import torch

from ctpo_megatron.algorithms.distillation import Likeliest, distillation_loss
from tests.support.naive_scan import borders
from tests.support.oracles_critic import prefix_weights_by_loop, reverse_kl_by_loop

LENGTHS, COLUMNS = (6, 0, 1, 20, 9), 3
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0], dtype=torch.float64)


def streams(seed: int) -> dict[str, torch.Tensor]:
    """Log-probs of student and teacher at sampled and at likeliest tokens; NaN where masked."""
    draw, size = torch.Generator().manual_seed(seed), sum(LENGTHS)
    mask = torch.rand(size, generator=draw) < 0.7
    sampled = [-2 * torch.rand(size, generator=draw, dtype=torch.float64) for _ in range(3)]
    tops = [(0.9 * torch.rand(size, COLUMNS + 1, generator=draw, dtype=torch.float64)).softmax(-1).log() for _ in range(2)]
    tops = [top[:, :COLUMNS].clone() for top in tops]
    tops[1][::4, -1] = -math.inf
    for stream in (*sampled, *tops):
        stream[~mask] = math.nan
    names = ("logp", "sampled_logp", "teacher_logp", "top", "teacher_top")
    return {"mask": mask, **dict(zip(names, (*sampled, *tops), strict=True))}


def per_sequence(given: dict[str, torch.Tensor], name: str) -> list[list]:
    return [part.tolist() for part in given[name].split(LENGTHS)]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sampled_distillation_is_its_definition(gamma: float) -> None:
    given = streams(2)
    logp = given["logp"].clone().requires_grad_()
    common = {name: given[name] for name in ("sampled_logp", "teacher_logp", "mask")}
    out = distillation_loss(logp=logp, **common, cu_seqlens=borders(LENGTHS), weights=WEIGHTS, gamma=gamma)
    out.loss.backward()
    losses, slopes = [], []
    names = ("logp", "sampled_logp", "teacher_logp", "mask")
    for weight, *row in zip(WEIGHTS.tolist(), *(per_sequence(given, name) for name in names), strict=True):
        gaps = [t - s if m else 0.0 for s, t, m in zip(*row[1:], strict=True)]
        of_prefix = prefix_weights_by_loop([abs(a) for a in gaps], row[3], gamma)
        losses += [-w * a * x if m else 0.0 for w, a, x, m in zip(of_prefix, gaps, row[0], row[3], strict=True)]
        slopes += [-weight * w * a for w, a in zip(of_prefix, gaps, strict=True)]
    # exact sums are rounded to 2^-38
    assert out.token_loss.tolist() == pytest.approx(losses, rel=1e-9, abs=1e-9)
    assert logp.grad.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-9)
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_distillation_over_the_likeliest_is_its_definition(gamma: float) -> None:
    given = streams(3)
    top = given["top"].clone().requires_grad_()
    common = {name: given[name] for name in ("logp", "sampled_logp", "teacher_logp", "mask")}
    likeliest = Likeliest(top, given["teacher_top"])
    out = distillation_loss(**common, cu_seqlens=borders(LENGTHS), weights=WEIGHTS, gamma=gamma, likeliest=likeliest)
    out.loss.backward()
    losses, slopes = [], []
    for weight, *row in zip(WEIGHTS.tolist(), *(per_sequence(given, n) for n in ("top", "teacher_top", "mask")), strict=True):
        points = [reverse_kl_by_loop(s, t) if m else (0.0, [0.0] * COLUMNS) for s, t, m in zip(*row, strict=True)]
        of_prefix = prefix_weights_by_loop([d for d, _ in points], row[2], gamma)
        losses += [w * d for w, (d, _) in zip(of_prefix, points, strict=True)]
        slopes += [weight * w * slope for w, (_, each) in zip(of_prefix, points, strict=True) for slope in each]
    assert out.token_loss.tolist() == pytest.approx(losses, rel=1e-9, abs=1e-9)
    assert top.grad.flatten().tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-9)


def test_a_teacher_that_agrees_teaches_nothing() -> None:
    given = streams(4)
    logp = given["logp"].clone().requires_grad_()
    same = {"sampled_logp": given["logp"], "teacher_logp": given["logp"], "mask": given["mask"]}
    out = distillation_loss(logp=logp, **same, cu_seqlens=borders(LENGTHS), weights=WEIGHTS)
    out.loss.backward()
    assert out.loss == 0
    assert not logp.grad.any()


def test_a_negative_gamma_is_refused() -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="gamma=-1: allowed are 0"):
        distillation_loss(
            logp=one, sampled_logp=one, teacher_logp=one, mask=one.bool(), cu_seqlens=torch.tensor([0, 1]), weights=one, gamma=-1
        )
