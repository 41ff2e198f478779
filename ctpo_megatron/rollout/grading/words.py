r"""Answers in words: letters of a choice, yes and no, names, HTHT. Equal text is equal; letters are no factors."""

from __future__ import annotations

import re

_CHOICE = re.compile(r"\(?\s*([A-Z])\s*[.):]?\s*\)?")
_CHOSEN = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(?:\S.*)?", re.DOTALL)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CAPITALS = re.compile(r"[A-Z]{2,}")
_SENTENCE = re.compile(r"[A-Za-z][A-Za-z'’.-]*(?:[ ,-]+[A-Za-z0-9'’.-]+)*")
_LONGEST_PRODUCT = 4  # letters: abcd may be a product, and Friday is a word
_SHORT = frozenset("yes no odd even none true all both one two six ten up down left red blue zero four five nine".split())


def read_words(text: str) -> str | None:
    """Returns the words of `text` (as `latex.tidy` leaves it) in one spelling, None where it is mathematics."""
    if "\\" not in text and not any(letter.isalpha() for letter in text):
        return None
    plain = _plain(text)
    marked = plain != text.strip()
    if choice := _CHOICE.fullmatch(plain):
        return choice[1]
    if chosen := _CHOSEN.fullmatch(plain):
        return chosen[1] or chosen[2]
    if "\\" in plain or re.search(r"[=<>+*/^_{}|]", plain):
        return None
    if _CAPITALS.fullmatch(plain):
        return plain
    if not _SENTENCE.fullmatch(plain):
        return None
    name = plain[0].isupper() and plain[1:].islower()
    if marked or name or " " in plain or len(plain) > _LONGEST_PRODUCT or plain in _SHORT:
        return spelled(plain)
    return None


def spelled(text: str) -> str:
    """Returns `text` in the spelling that words are compared in: lower case, single spaces, no commas."""
    return re.sub(r"[\s,]+", " ", _plain(text)).casefold().strip(" .")


def _plain(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip().strip("*").strip()
