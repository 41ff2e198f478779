"""The toy model is a complete model directory, the same for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.toy.model import Kind, make_toy_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_model(tmp_path_factory.mktemp("toy") / "model", seed=3)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_is_a_complete_model(kind: Kind, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    shape = read_hf_config(make_toy_model(tmp_path / kind, kind, seed=1))
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.vocab_size) == (kind, 2, 128, 264)
    assert shape.num_experts == (4 if kind == "qwen3_moe" else 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    assert model.dtype == torch.float32
    assert 0.3e6 < model.num_parameters() < 0.8e6
    assert model.generation_config.eos_token_id == 257
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / kind).iterdir()}
    assert set(modes.values()) == {(tmp_path / kind).stat().st_mode & 0o666}, modes


def test_same_seed_same_bytes(toy: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again, other = make_toy_model(tmp_path / "again", seed=3), make_toy_model(tmp_path / "other", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    names = sorted(file.name for file in toy.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    assert all((toy / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (toy / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_tokens_are_bytes(toy: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy)
    text = "".join(chr(code) for code in range(256)) + " \n\n  é漢😀 print(12*34)"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("<|tool|>a<|im_end|>").input_ids == [261, ord("a"), 257]
    assert (tokenizer.pad_token, tokenizer.eos_token, len(tokenizer)) == ("<|pad|>", "<|im_end|>", 264)


def test_chat_template_takes_two_tokens_per_message(toy: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy)
    roles = ("system", "user", "assistant", "tool")
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": role[0]} for role in roles], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|system|>s<|im_end|><|user|>u<|im_end|><|assistant|>a<|im_end|><|tool|>t<|im_end|><|assistant|>"
    assert len(tokenizer(text).input_ids) == 4 * 3 + 1


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'qwen3'"):
        make_toy_model(tmp_path, "qwen33", seed=1)  # type: ignore[arg-type]
