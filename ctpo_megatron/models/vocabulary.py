"""Which tokens of a tokenizer have no row in the model's embedding, from its files alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.files import read_json


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a tokenizer. A special one is found in prompts only: elsewhere its name stays ordinary text."""

    id: int
    text: str
    special: bool = False


def tokens_beyond(directory: Path, rows: int) -> list[Token]:
    """The tokens whose id is `rows` or more, by id. Empty where the files are not of a kind that is read here.

    Read are tokenizer.json, or vocab.json with added_tokens.json, and what tokenizer_config.json adds. Raises ModelError for a
    file that is not what its name says.
    """
    found = {token.id: token for token in _tokens(directory) if token.id >= rows}
    return [found[id_] for id_ in sorted(found)]


def check_ordinary(beyond: list[Token], directory: Path, rows: int) -> None:
    """Raise ModelError where a token that is not special is among those `beyond` the embedding: any text may hold it."""
    ordinary = [token for token in beyond if not token.special]
    if ordinary:
        raise ModelError(
            f"{directory}: the tokenizer has {_named(ordinary)}, but the model has {rows} embeddings (vocab_size of "
            "config.json), for ids below that. Take the tokenizer that belongs to the model, or resize the model's embedding."
        )


def check_same_tokens(one: Path, other: Path, what: str) -> None:
    """Raise ModelError where a token id means something else in `other`, which is called `what`, than in `one`.

    Compared are the files that are read here, and else those of sentencepiece and tiktoken, byte by byte.
    """
    mine, theirs = ({token.id: token.text for token in _tokens(directory)} for directory in (one, other))
    if not mine or not theirs:
        if not _same_files(one, other):
            raise ModelError(
                f"{other}, {what}, and {one} have tokenizers that cannot be compared: both need tokenizer.json or vocab.json, or "
                f"the same file, one of {', '.join(_WHOLE)}."
            )
        return
    differing = sorted(id_ for id_ in mine.keys() | theirs.keys() if mine.get(id_) != theirs.get(id_))
    if differing:
        shown = ", ".join(f"{id_} is {_text(theirs, id_)} instead of {_text(mine, id_)}" for id_ in differing[:3])
        raise ModelError(
            f"{other}, {what}, has another vocabulary than {one}: {len(differing)} of {len(mine)} token ids differ, {shown}. "
            "Token ids are all that a teacher is given, so both need the same tokenizer."
        )


_WHOLE = ("tokenizer.model", "tiktoken.model")


def _same_files(one: Path, other: Path) -> bool:
    """Whether both directories have a tokenizer in one file, of the same bytes."""
    found = [name for name in _WHOLE if (one / name).is_file() and (other / name).is_file()]
    return bool(found) and all((one / name).read_bytes() == (other / name).read_bytes() for name in found)


def _text(vocabulary: Mapping[int, str], id_: int) -> str:
    return repr(vocabulary[id_]) if id_ in vocabulary else "no token"


def largest_id(directory: Path) -> int:
    """The largest id of the tokenizer's tokens; 0 where its files are not of a kind that is read here."""
    return max((token.id for token in _tokens(directory)), default=0)


def _named(tokens: list[Token]) -> str:
    named = ", ".join(f"{token.text!r} with id {token.id}" for token in tokens[:3])
    return named if len(tokens) <= 3 else f"{named} and {len(tokens) - 3} more"


def _tokens(directory: Path) -> Iterator[Token]:
    whole, vocabulary = directory / "tokenizer.json", directory / "vocab.json"
    if whole.is_file():
        content = read_json(whole)
        model = content.get("model")
        yield from _vocabulary(model.get("vocab") if isinstance(model, Mapping) else None)
        for entry in content.get("added_tokens") or []:
            yield from _added(entry.get("id"), entry)
    elif vocabulary.is_file():
        yield from _vocabulary(read_json(vocabulary))
        names = directory / "added_tokens.json"  # which of them are special is not said there
        added = read_json(names) if names.is_file() else {}
        yield from (Token(id_, text, special=True) for text, id_ in added.items() if type(id_) is int)
    settings = directory / "tokenizer_config.json"
    decoder = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    for id_, entry in (decoder or {}).items():
        yield from _added(int(id_), entry)


def _vocabulary(vocab: Any) -> Iterator[Token]:
    """Of {text: id}, or of a list of [text, score] in the order of ids."""
    if isinstance(vocab, Mapping):
        yield from (Token(id_, text) for text, id_ in vocab.items() if type(id_) is int)
    elif isinstance(vocab, list):
        yield from (Token(id_, str(entry[0])) for id_, entry in enumerate(vocab))


def _added(id_: Any, entry: Any) -> Iterator[Token]:
    if type(id_) is int and isinstance(entry, Mapping):
        yield Token(id_, str(entry.get("content", "")), bool(entry.get("special", False)))
