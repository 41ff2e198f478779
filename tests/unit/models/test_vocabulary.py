"""Tokens without a row in the embedding, from the files of a tokenizer; and tokenizers of which only foreign files are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.files import FOREIGN_TOKENIZERS, check_tokenizer, check_what_is_there
from ctpo_megatron.models.vocabulary import Token, check_ordinary, tokens_beyond
from tests.unit.models.test_config import write_safetensors

BPE = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}},
    "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
}


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def added(id_: int, text: str, special: bool) -> dict[str, Any]:
    return {"id": id_, "content": text, "special": special}


@pytest.mark.parametrize(
    ("files", "beyond"),
    [
        ({"tokenizer": BPE}, []),
        (
            {"tokenizer": BPE | {"added_tokens": [added(5, "<x>", True), added(4, "<y>", False)]}},
            [Token(4, "<y>"), Token(5, "<x>", True)],
        ),
        ({"tokenizer": {"model": {"vocab": [["a", 0.0]] * 5}}}, [Token(4, "a")]),
        ({"tokenizer": {"model": {"vocab": {"<s>": 9}}, "added_tokens": [added(9, "<s>", True)]}}, [Token(9, "<s>", True)]),
        ({"tokenizer": {}}, []),
        ({"vocab": {"a": 0, "b": 7}, "added_tokens": {"<pad>": 8}}, [Token(7, "b"), Token(8, "<pad>", True)]),
        (
            {
                "tokenizer": BPE,
                "tokenizer_config": {"added_tokens_decoder": {"3": added(3, "c", True), "6": added(6, "<z>", True)}},
            },
            [Token(6, "<z>", True)],
        ),
        ({}, []),
    ],
)
def test_tokens_beyond_four_rows(tmp_path: Path, files: dict[str, Any], beyond: list[Token]) -> None:
    assert tokens_beyond(write(tmp_path, **files), 4) == beyond


def test_ordinary_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    check_ordinary([Token(9, "<pad>", True)], tmp_path, 4)
    tokens = [Token(9, "<pad>", True), *(Token(id_, f"t{id_}") for id_ in range(10, 15))]
    with pytest.raises(ModelError, match=r"'t10' with id 10, .*'t12' with id 12 and 2 more, but the model has 4 embeddings"):
        check_ordinary(tokens, tmp_path, 4)


@pytest.mark.parametrize("name", FOREIGN_TOKENIZERS)
def test_tokenizers_that_need_the_models_own_code(tmp_path: Path, name: str) -> None:
    """As Moonlight and Kimi are published. Saved once as tokenizer.json, the same directory is taken."""
    (tmp_path / name).write_text("")
    write(tmp_path, tokenizer_config={})
    with pytest.raises(ModelError, match=rf"{name} only.*never run here.*tokenizer\.json.*docs/models\.md"):
        check_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        check_what_is_there(tmp_path)
    write(tmp_path, tokenizer=BPE)
    check_tokenizer(tmp_path)


def test_the_lines_of_the_documentation_save_such_a_tokenizer(tmp_path: Path) -> None:
    """docs/models.md: run as they stand, they give the ids of tiktoken itself, also beside tokenizer_config.json as published."""
    import base64
    import re

    import tiktoken
    from transformers import AutoTokenizer

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" t": 258}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "tiktoken.model").write_text("".join(lines))
    names, pattern = ["[BOS]", "[EOS]"], r" ?\p{L}+|\p{N}{1,3}|\s+|."
    published = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_x.TikTokenTokenizer", None]},
    }
    write(tmp_path, tokenizer_config=published | {"eos_token": "[EOS]"}, config={"model_type": "deepseek_v3"})
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    (code,) = re.findall(r"```python\n(.*?TikTokenConverter.*?)```", text, flags=re.DOTALL)
    exec(compile(code, "docs/models.md", "exec"), {"DIRECTORY": str(tmp_path), "PATTERN": pattern, "SPECIAL_TOKENS": names})
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    special = {name: 259 + number for number, name in enumerate(names)}
    judge = tiktoken.Encoding("judge", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    for words in ("the theatre, then 12345", "größe 你好[EOS]"):
        assert loaded.encode(words, add_special_tokens=False) == judge.encode(words, allowed_special="all")
    assert loaded.eos_token_id == special["[EOS]"]
    assert tokens_beyond(tmp_path, 261) == []


def test_a_plan_needs_no_more_than_a_config(tmp_path: Path) -> None:
    """But what is there of a model must be whole."""
    assert check_what_is_there(tmp_path) == ["tokenizer", "weights"]
    write(tmp_path, tokenizer=BPE, tokenizer_config={})
    assert check_what_is_there(tmp_path) == ["weights"]
    write_safetensors(tmp_path / "model.safetensors")
    assert check_what_is_there(tmp_path) == []
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer_config"):
        check_what_is_there(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ModelError, match="its header announces"):
        check_what_is_there(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        check_what_is_there(tmp_path)
