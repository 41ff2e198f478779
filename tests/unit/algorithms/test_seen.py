"""What a loss tells of its tokens for the record: the same that its statistics count, token by token."""

from __future__ import annotations

import pytest
import torch

from ctpo_megatron.algorithms import LocalScan, Seen, make_recipe, recipe_loss
from ctpo_megatron.algorithms import per_token as parts
from ctpo_megatron.record.token_files import FATES


@pytest.mark.parametrize("objective", ["ctpo", "grpo"])
def test_what_is_seen_is_what_is_counted(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 7)  # the parts follow one another
    drawn = torch.Generator().manual_seed(3)
    old, change = -torch.rand(40, generator=drawn), torch.randn(40, generator=drawn)
    mask = torch.rand(40, generator=drawn) < 0.8
    advantages = torch.where(torch.arange(40) < 25, 1.0, -1.0) * mask
    seen: list[Seen] = []
    found = recipe_loss(
        make_recipe({"type": objective}, "token-mean", None, has_rollout=False),
        logp=(old + change).requires_grad_(),
        old_logp=old,
        advantages=advantages,
        mask=mask,
        cu_seqlens=torch.tensor([0, 25, 40]),
        scan=LocalScan(),
        seen=seen,
    )
    fate, log_ratio = torch.cat([each.fate for each in seen])[mask], torch.cat([each.log_ratio for each in seen])[mask]
    means = {name: float(each.total / each.weight) for name, each in found.stats.means.items()}
    assert float((fate > 0).double().mean()) == pytest.approx(means["clip_fraction"])
    assert 0 < means["clip_fraction"] < 1
    cut = fate == FATES.index("cut by the dual clip")
    assert float(cut.double().mean()) == pytest.approx(means["clip_dual"])
    assert float((fate == 1).double().mean()) == pytest.approx(means["clip_high"])
    assert float(log_ratio.double().square().mean()) == pytest.approx(means["log_ratio_sq"], rel=1e-2)
    assert {each.fate.dtype for each in seen} == {torch.uint8}
