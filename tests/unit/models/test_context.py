"""Context against the lengths that are asked for, and what of it SGLang keeps for itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.config.rollout import DataConfig, EngineConfig, RolloutConfig
from ctpo_megatron.errors import ConfigError, ModelError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.context import RESERVED, argument, check_context, check_length
from ctpo_megatron.models.shape import ModelShape
from tests.unit.models.test_defaults import BASES

SHAPE = parse_config(BASES["qwen3"])  # a context of 512


def checked(shape: ModelShape, prompt: int, response: int, *extra: str, **engine: Any) -> str:
    """The refusal of a run with these limits; empty where it is allowed."""
    rollout = RolloutConfig(max_response_tokens=response, engine=EngineConfig(extra_args=extra, **engine))
    try:
        check_context(shape, DataConfig(train="t", max_prompt_tokens=prompt), rollout)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("prompt", "response", "extra", "engine", "words"),
    [
        (256, 256, (), {}, ["256 + 256 = 512", "max_position_embeddings of the model's config.json = 512", "6 free", "506"]),
        (96, 411, (), {}, ["96 + 411 = 507", "Allowed are 506"]),
        (600, 1, (), {}, ["600 + 1 = 601", "512"]),
        (96, 300, ("--context-length", "400"), {}, ["--context-length in rollout.engine.extra_args = 400", "394"]),
        (96, 300, ("--context-length=0.4k",), {}, ["--context-length in rollout.engine.extra_args = 400"]),
        (96, 96, ("--context-length", "1Ki"), {}, ["--context-length 1024", "max_position_embeddings = 512", "not start"]),
        (96, 300, (), {"max_total_tokens": 200}, ["rollout.engine.max_total_tokens = 200"]),
        (96, 300, ("--max-total-tokens", "300"), {"max_total_tokens": 900}, ["--max-total-tokens", "= 300"]),
    ],
)
def test_what_does_not_fit_names_both_sides(
    prompt: int, response: int, extra: tuple[str, ...], engine: dict[str, Any], words: list[str]
) -> None:
    message = checked(SHAPE, prompt, response, *extra, **engine)
    for word in words:
        assert word in message


def test_what_fits() -> None:
    assert checked(SHAPE, 96, 410) == ""
    assert checked(SHAPE, 96, 300, "--context-length", "402") == ""
    assert checked(SHAPE, 96, 300, "--max-total-tokens", "402", max_total_tokens=10) == "", (
        "the extra argument wins, as in SGLang"
    )


@pytest.mark.parametrize("key", ["max_sequence_length", "seq_length", "max_seq_len", "model_max_length"])
def test_sglang_takes_other_keys_for_the_context_first(key: str) -> None:
    """Then the smaller of the two binds, and the message says which it is."""
    from sglang.srt.utils.hf_transformers.common import get_context_length
    from transformers import CONFIG_MAPPING

    for value in (100, 4096):
        config = BASES["qwen3"] | {key: value}
        shape = parse_config(config)
        served = get_context_length(CONFIG_MAPPING["qwen3"](**{k: v for k, v in config.items() if k != "model_type"}))
        assert served == value
        assert shape.max_positions == min(512, served)
        assert shape.context_key == (key if value == 100 else "max_position_embeddings")
    assert f"{key} of the model's config.json = 100" in checked(parse_config(BASES["qwen3"] | {key: 100}), 60, 40)
    with pytest.raises(ModelError, match=f"{key} is '8k'"):
        parse_config(BASES["qwen3"] | {key: "8k"})


@pytest.mark.parametrize(
    "rope", [{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, {"rope_type": "default"}, {}]
)
def test_stretching_does_not_lengthen_the_served_context(rope: dict[str, Any]) -> None:
    """SGLang multiplies by a factor only where the old context is not named, which is refused."""
    from sglang.srt.utils.hf_transformers.common import get_context_length
    from transformers import CONFIG_MAPPING

    config = BASES["qwen3"] | {"rope_scaling": rope}
    read = CONFIG_MAPPING["qwen3"](
        **{key: value for key, value in config.items() if key != "model_type"} | {"rope_scaling": {**rope}}
    )
    assert parse_config(config).max_positions == get_context_length(read)


def test_the_reserve_is_what_sglang_keeps() -> None:
    """`TpModelWorker.get_worker_info` takes one token of the context and five more of the input; requests must be shorter."""
    import importlib.util

    managers = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "managers"
    source = (managers / "tp_worker.py").read_text()
    assert "self.model_config.context_len - 1" in source
    assert "max_req_input_len = max_req_len - 5" in source
    assert "len(req.origin_input_ids) >= max_req_input_len" in (managers / "utils.py").read_text()
    context = 100
    longest_input = (context - 1 - 5) - 1
    assert context - RESERVED - 1 == longest_input, "of a turn that has room for one more token"


def test_the_last_of_several_arguments_counts() -> None:
    engine = EngineConfig(extra_args=("--context-length=1", "--x", "--context-length", "2", "--b=3"))
    assert (argument(engine, "--context-length"), argument(engine, "--b"), argument(engine, "--x")) == (
        "2",
        "3",
        "--context-length",
    )
    assert argument(engine, "--z") is None
    assert argument(EngineConfig(extra_args=("--z",)), "--z") == ""


def test_demonstrations_are_held_to_the_context() -> None:
    check_length(512, SHAPE, "d.jsonl row 3")
    with pytest.raises(
        ConfigError, match=r"d\.jsonl row 3: the demonstration has 513 tokens; allowed: max_position_embeddings = 512"
    ):
        check_length(513, SHAPE, "d.jsonl row 3")
    with pytest.raises(ConfigError, match="seq_length = 512"):
        check_length(513, replace(SHAPE, context_key="seq_length"), "x")
