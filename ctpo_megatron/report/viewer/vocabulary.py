"""The bytes that each token stands for, so that a page can show tokens one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces of a tokenizer. `special` are tokens of the template, which no text is cut into."""

    source: str  # where it was read, for a person
    pieces: dict[int, bytes]
    special: set[int]

    def table(self, ids: Iterable[int]) -> dict[str, Any]:
        """Returns the pieces of `ids` as JSON values: a character for each byte."""
        known = [each for each in sorted(ids) if each in self.pieces]
        return {
            "ids": known,
            "pieces": [self.pieces[each].decode("latin-1") for each in known],
            "special": sorted(self.special.intersection(known)),
        }


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    type: str = ""
    vocab: msgspec.Raw = msgspec.Raw(b"{}")


class _File(msgspec.Struct):
    """What is read of a tokenizer.json."""

    model: _Model
    added_tokens: list[_Added] = []
    decoder: Any = None


def find_vocabulary(directories: Iterable[Path]) -> Vocabulary | None:
    """Returns the vocabulary of the first directory that has a tokenizer.json which can be read; None where none has."""
    for directory in directories:
        path = directory / "tokenizer.json"
        try:
            return read_vocabulary(path)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return None


def read_vocabulary(path: Path) -> Vocabulary:
    """Returns the vocabulary of a tokenizer.json. Raises OSError, or an error of msgspec where it is none."""
    file = msgspec.json.decode(path.read_bytes(), type=_File)
    if file.model.type == "Unigram":
        listed = msgspec.json.decode(file.model.vocab, type=list[tuple[str, float]])
        names = {number: name for number, (name, _) in enumerate(listed)}
    else:
        names = {number: name for name, number in msgspec.json.decode(file.model.vocab, type=dict[str, int]).items()}
    by_byte = _bytes_of_characters() if "ByteLevel" in _decoders(file.decoder) else None
    pieces = {number: _piece(name, by_byte) for number, name in names.items()}
    pieces |= {each.id: each.content.encode("utf-8", "surrogatepass") for each in file.added_tokens}
    return Vocabulary(str(path), pieces, {each.id for each in file.added_tokens if each.special})


def _decoders(decoder: Any) -> set[str]:
    """Returns the types of a decoder and of those that it is a sequence of."""
    if not isinstance(decoder, dict):
        return set()
    parts = decoder.get("decoders") or []
    return {str(decoder.get("type"))}.union(*(_decoders(each) for each in parts)) if parts else {str(decoder.get("type"))}


def _piece(name: str, by_byte: dict[str, int] | None) -> bytes:
    if by_byte is not None and all(character in by_byte for character in name):
        return bytes(by_byte[character] for character in name)
    raw = _BYTE.fullmatch(name)
    if raw is not None:
        return bytes([int(raw[1], 16)])
    return name.replace(_SPACE, " ").encode("utf-8", "surrogatepass")


def _bytes_of_characters() -> dict[str, int]:
    """Returns the byte of each character of byte-level vocabularies: printable Latin-1 is itself, the rest is from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(moved)}
