"""What a plan counts for adapters; tests/dist/test_plan_numbers.py holds the formula against real layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.plan import plan_of
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.planning.memory import StageMemory
from ctpo_megatron.planning.plan import Hardware

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_dora_keeps_the_outputs_of_adapted_layers_once_more(recompute: str) -> None:
    """Counted by hand for Qwen3-4B at tp 2, bfloat16: of 36 layers, or twice of the one that is computed again."""
    shape = parse_config(json.loads((CONFIGS / "models" / "qwen3-4b" / "config.json").read_text()))

    def memory_of(adapter: str) -> StageMemory:
        overrides = [f"model.adapter={adapter}", f"train.recompute={recompute}"]
        (stage,) = plan_of(load_config(CONFIGS / "qwen3-4b.yaml", overrides), shape, Hardware(640.0)).stages
        return stage.memory

    lora, dora = memory_of("{rank: 16}"), memory_of("{rank: 16, use_dora: true}")
    tokens, hidden, qkv, gate_up = 12288, 2560, (32 + 2 * 8) * 128 // 2, 2 * 9728 // 2
    outputs = tokens * (qkv + gate_up) + tokens // 2 * 2 * hidden  # those of o and down are shared out by tokens
    numbers = qkv + gate_up + 2 * hidden  # of each a length and a factor, in float32
    layer = 2 * outputs + 8 * numbers
    assert dora.activations - lora.activations == (0 if recompute == "full" else 36 * layer)
    assert dora.working - lora.working == (2 if recompute == "full" else 1) * layer
