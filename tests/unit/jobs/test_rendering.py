"""What a chat template cannot write is an error of the input that names the row and the setting, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config, load_config
from ctpo_megatron.data.sft import read_demonstrations
from ctpo_megatron.errors import DataError
from ctpo_megatron.jobs.inputs import load_prompts
from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support import chat_models as of


def write(
    tmp_path: Path, family: of.Family, prompts: list[list[dict[str, str]]], **config: object
) -> tuple[RunConfig, ChatTokenizer]:
    """The configuration of a run on these prompts, and its chat."""
    model = family.write(tmp_path / "model")
    rows = [{"prompt": prompt, "reward_model": {"ground_truth": "3"}} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "n",
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model), **config.pop("model", {})},
        "data": {"train": str(tmp_path / "rows.jsonl"), **config.pop("data", {})},
        **config,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    read = load_config(tmp_path / "run.yaml")
    return read, ChatTokenizer(read.model.path, read.model)


ASK = [{"role": "user", "content": "1 + 2?"}]
BRIEF = [{"role": "system", "content": "Be brief."}, *ASK]


@pytest.mark.parametrize("family", [of.MISTRAL, of.GEMMA])
def test_a_template_that_raises_at_the_system_prompt(tmp_path, family):
    config, chat = write(tmp_path, family, [ASK, ASK], data={"system_prompt": "Be brief."})
    with pytest.raises(DataError) as caught:
        load_prompts(config.data.train, config, chat)
    assert caught.value.exit_code == 2
    assert "rows.jsonl row 0: the chat template of" in str(caught.value)
    assert "set data.system_prompt to null" in str(caught.value)


def test_a_row_of_another_form_is_named(tmp_path):
    config, chat = write(tmp_path, of.GEMMA, [ASK, ASK, BRIEF])
    with pytest.raises(DataError, match=r"row 2: .*System role not supported"):
        load_prompts(config.data.train, config, chat)


def test_turns_are_compared_only_where_a_tool_is(tmp_path):
    config, chat = write(tmp_path, of.MISTRAL_LAST, [BRIEF])
    with pytest.raises(DataError, match=r"row 0: .*otherwise than turn by turn.*rollout\.tool=null"):
        load_prompts(config.data.train, config, chat)
    alone, chat = write(tmp_path, of.MISTRAL_LAST, [BRIEF], rollout={"tool": None})
    assert len(load_prompts(alone.data.train, alone, chat)) == 1


def test_a_base_model_runs_with_stop_tokens_of_the_configuration_and_they_are_recorded(tmp_path):
    given = {"stop_tokens": ["<|im_end|>"], "chat_date": "2026-01-31"}
    config, chat = write(tmp_path, of.QWEN25_BASE, [ASK, BRIEF], model=given)
    assert len(load_prompts(config.data.train, config, chat)) == 2
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert "chat_date: '2026-01-31'" in again.read_text()


def test_a_demonstration_that_cannot_be_taught_is_named(tmp_path):
    rows = tmp_path / "sft.jsonl"
    answer = {"role": "assistant", "content": "<think>\nI add.\n</think>\n\n3"}
    rows.write_text(json.dumps({"messages": [*ASK, answer]}) + "\n")
    with pytest.raises(DataError, match=r"sft\.jsonl line 1: .*cannot be taught"):
        read_demonstrations(rows, ChatTokenizer(of.DEEPSEEK_R1.write(tmp_path / "r1")))
    (sample,) = read_demonstrations(rows, ChatTokenizer(of.QWEN3.write(tmp_path / "qwen3")))
    assert sum(sample.mask) > len("I add.3")
