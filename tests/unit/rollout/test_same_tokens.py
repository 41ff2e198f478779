"""The tokenizer that transformers loads is the one that tokenizer.json describes, or the start is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ctpo_megatron.errors import ModelError
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.same_tokens import PROBES, check_same_tokens
from ctpo_megatron.toy.model import make_toy_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_model(tmp_path_factory.mktemp("toy") / "model", seed=1)


def change(directory: Path, **parts: Any) -> None:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def byte_level(directory: Path, **config: Any) -> Path:
    """A model directory with a byte-level tokenizer, as DeepSeek-V3's or Qwen's, without merges."""
    letters = {letter: id_ for id_, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "!"}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_sound_directory(toy: Path) -> None:
    ChatTokenizer(toy)
    check_same_tokens(toy, AutoTokenizer.from_pretrained(toy))


@pytest.mark.parametrize("probe", PROBES)
def test_probes_round_trip(toy: Path, probe: str) -> None:
    """What they are made of is in them: none is empty to a tokenizer of bytes."""
    assert len(AutoTokenizer.from_pretrained(toy).encode(probe)) >= 32


def test_another_normalizer_is_found(toy: Path, tmp_path: Path) -> None:
    described = Tokenizer.from_file(str(toy / "tokenizer.json"))
    described.normalizer = normalizers.Lowercase()
    described.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError) as caught:
        check_same_tokens(tmp_path, AutoTokenizer.from_pretrained(toy))
    for words in (str(tmp_path), "tokenizer.json", "Hello world", "model_type", "transformers_version", "fix_mistral_regex"):
        assert words in str(caught.value)


def test_lost_spaces_are_found(tmp_path: Path) -> None:
    """A byte-level tokenizer that a class of sentencepiece's kind takes for its own."""
    directory = byte_level(tmp_path / "m", model_type="deepseek_v3")
    described = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    check_same_tokens(directory, described)
    described.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ModelError, match=r"another tokenizer than tokenizer\.json describes"):
        check_same_tokens(directory, described)


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen3"}, {"model_type": "llama"}])
def test_a_tokenizer_that_loads_as_llamas_and_loses_its_spaces(tmp_path: Path, config: dict[str, str]) -> None:
    """tokenizer_class names LlamaTokenizerFast beside a byte-level tokenizer.json, as in DeepSeek's distilled models.

    transformers 5.19 follows the name, unless model_type is deepseek_v3. What the message says to do helps.
    """
    directory = byte_level(tmp_path / "m", **config)
    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert loaded.decode(loaded.encode("a b", add_special_tokens=False)) == "ab"
    with pytest.raises(ModelError, match=r"as LlamaTokenizer\..*tokenizer_class .*PreTrainedTokenizerFast"):
        check_same_tokens(directory, loaded)
    settings = directory / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("LlamaTokenizerFast", "PreTrainedTokenizerFast"))
    check_same_tokens(directory, AutoTokenizer.from_pretrained(directory, local_files_only=True))


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_directory_that_names_the_plain_class_gets_it(tmp_path: Path, named: str) -> None:
    """transformers 5.19 takes Qwen2Tokenizer for every qwen2, with Qwen's normalizer in place of the one described."""
    directory = make_toy_model(tmp_path / "m", kind="qwen2", seed=1)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": named}))
    with pytest.raises(ModelError, match="as Qwen2Tokenizer"):
        check_same_tokens(directory, AutoTokenizer.from_pretrained(directory, local_files_only=True))
    assert "e\u0301" in (chat := ChatTokenizer(directory)).decode(chat.prompt_ids([{"role": "user", "content": "e\u0301"}]))


def test_the_same_files_beside_their_own_config(tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "m", model_type="deepseek_v3")
    check_same_tokens(directory, AutoTokenizer.from_pretrained(directory, local_files_only=True))


def test_truncation_and_padding_of_the_file_do_not_count(toy: Path, tmp_path: Path) -> None:
    """They are settings for batches, which transformers applies only where it is asked to."""
    (tmp_path / "tokenizer.json").write_text((toy / "tokenizer.json").read_text())
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    change(tmp_path, truncation=truncation)
    check_same_tokens(tmp_path, AutoTokenizer.from_pretrained(toy))


def test_without_the_file_there_is_nothing_to_compare(tmp_path: Path) -> None:
    check_same_tokens(tmp_path, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        check_same_tokens(tmp_path, None)
