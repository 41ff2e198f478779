"""The terms of a policy's loss on micro-batches that are out of the ordinary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctpo_megatron.algorithms import LocalScan
from ctpo_megatron.data.packing import pack
from ctpo_megatron.mcore.policy_terms import _signal
from ctpo_megatron.types import TrainSample

WRITTEN = TrainSample([1, 2], [2, 3], [False, True], [0.0, -0.5], [-1, 0], [0.0, 1.0], 0)
NOTHING = replace(WRITTEN, mask=[False, False], rollout_logp=[0.0, 0.0], versions=[-1, -1], advantages=[0.0, 0.0], teacher=0)


@pytest.mark.parametrize(
    "samples", [[NOTHING], [NOTHING, WRITTEN], [NOTHING, replace(WRITTEN, teacher=0, teacher_logp=[0.0, -2.0])]]
)
def test_a_sample_without_tokens_is_taught_nothing(samples: list[TrainSample]) -> None:
    """Its teacher was not asked, as there is nothing to ask about, so there may be no log-probs of any teacher."""
    ((mb,),) = pack(samples, dp=1, max_tokens=64)
    signal = _signal(torch.full((mb.positions,), -1.0), mb, LocalScan())
    taught = [token.item() for token, told in zip(signal.gap, signal.mask, strict=True) if told]
    assert taught == [-1.5] * (samples[-1].teacher_logp is not None)
    assert not signal.gap[~signal.mask].any()


def test_what_no_teacher_was_asked_about_is_no_silence() -> None:
    """Log-probs that should be there, of a token that was sampled, are asked for by name."""
    ((mb,),) = pack([replace(WRITTEN, teacher=0)], dp=1, max_tokens=64)
    with pytest.raises(ValueError, match="teacher_logp"):
        _signal(torch.full((mb.positions,), -1.0), mb, LocalScan())
