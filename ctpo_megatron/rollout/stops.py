"""The tokens at which an assistant's turn stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import ConfigError, ModelError, near_miss


def find_stop_tokens(path: Path, tokenizer: Any, given: Sequence[str]) -> list[int]:
    """Ids of all tokens that stop a generation, ascending: of the tokenizer, config.json, generation_config.json and `given`.

    An inference server stops at those of the model's files by itself. Raises ModelError and ConfigError.
    """
    found = {tokenizer.eos_token_id, *_named_in(path / "config.json"), *_named_in(path / "generation_config.json")}
    found |= {_token_id(tokenizer, name, path) for name in given}
    found.discard(None)
    if not found:
        raise ModelError(
            f"{path}: neither the tokenizer nor generation_config.json names an eos token; name one with model.stop_tokens"
        )
    return sorted(found)


def _named_in(config: Path) -> list[int]:
    """Values of eos_token_id in a JSON file."""
    if not config.is_file():
        return []
    try:
        named = dict(json.loads(config.read_text(encoding="utf-8"))).get("eos_token_id")
    except (ValueError, TypeError) as error:
        raise ModelError(f"{config} is not a JSON object: {error}") from error
    return named if isinstance(named, list) else [] if named is None else [named]


def _token_id(tokenizer: Any, name: str, path: Path) -> int:
    """The id of the token that `name` is the text of."""
    if name in (added := tokenizer.get_added_vocab()):
        return added[name]
    ids = tokenizer.encode(name, add_special_tokens=False) if name else []
    if len(ids) != 1:
        raise ConfigError(
            f"model.stop_tokens: {name!r} is not one token of {path}, but {len(ids)}; name one token.{near_miss(name, added)}"
        )
    return ids[0]
