"""What servers have to show: the canary's bound by model and number format, and the text that canaries are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.jobs.publication import CANARY_PROMPTS, canary_texts, make_proof
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.types import Prompt
from tests.unit.cluster.test_runtime import DENSE, EXPERTS, SIZES

# a width that SGLang's layout on CPUs takes
MIXTURE = parse_config({"model_type": "qwen3_moe"} | SIZES | EXPERTS | {"moe_intermediate_size": 64})


def config(**sections: Any) -> RunConfig:
    needed = {"name": "r", "run_dir": "r", "model": {"path": "m"}, "data": {"train": "d"}, "cluster": {"device": "cuda"}}
    return RunConfig.model_validate(needed | sections)


def test_the_bound_of_the_canary() -> None:
    """By the model, the number format on the device, and whether the trainer follows the servers' experts."""
    on_cpu, replay = {"cluster": {"device": "cpu"}}, {"moe": {"routing_replay": True}}
    found = {
        "dense": make_proof(config(), DENSE),
        "dense, replay asked for": make_proof(config(**replay), DENSE),
        "mixture": make_proof(config(), MIXTURE),
        "mixture, replayed": make_proof(config(**replay), MIXTURE),
        "dense in float32": make_proof(config(**on_cpu), DENSE),
        "mixture in float32": make_proof(config(**on_cpu), MIXTURE),
    }
    assert {name: proof.tolerance for name, proof in found.items()} == {
        "dense": 0.1,
        "dense, replay asked for": 0.1,
        "mixture": 0.75,
        "mixture, replayed": 0.15,
        "dense in float32": 2e-4,
        "mixture in float32": 1e-3,
    }
    assert {name for name, proof in found.items() if proof.routing is not None} == {"mixture, replayed"}
    assert found["mixture, replayed"].routing == MIXTURE.routing


@pytest.mark.parametrize("shape", [DENSE, MIXTURE])
def test_an_explicit_bound_wins(shape: Any) -> None:
    assert make_proof(config(attest={"canary_tolerance": 0.3}), shape).tolerance == 0.3


class Words:
    """A tokenizer of one token per character."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [ord(character) for message in messages for character in message["content"]]


@pytest.mark.parametrize("count", [0, 1, CANARY_PROMPTS, CANARY_PROMPTS + 1, 17_000])
def test_canaries_are_made_of_prompts_from_the_whole_file(count: int) -> None:
    prompts = [Prompt(index, ({"role": "user", "content": chr(index)},), "") for index in range(count)]
    texts = canary_texts(prompts, Words())
    assert min(count, CANARY_PROMPTS / 2) <= len(texts) <= CANARY_PROMPTS
    if count:
        drawn = [text[0] for text in texts]
        assert drawn[0] == 0
        assert drawn[-1] >= count - 2 * count / CANARY_PROMPTS - 1
