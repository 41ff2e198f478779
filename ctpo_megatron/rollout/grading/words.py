r"""Answers in words: letters of a choice, yes and no, names, HTHT. Equal text is equal; letters are no factors."""

from __future__ import annotations

import re

_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*[.):]?\s*\)?")
_CHOSEN = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(?:\S.*)?", re.DOTALL)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_CAPITALS = re.compile(r"[A-Z]{2,}")
_SENTENCE = re.compile(r"[A-Za-z][A-Za-z'’.-]*(?:[ ,]+[A-Za-z0-9'’.-]+)*")
_LONGEST_PRODUCT = 4  # letters: abcd may be a product, and Friday is a word
_SHORT = frozenset(
    {"yes", "no", "odd", "even", "none", "true", "all", "both", "one", "two", "six", "ten", "up", "down", "left", "red", "blue"}
    | {"zero", "four", "five", "nine"}
)  # words that could be products


def same_words(left: str, right: str) -> bool | None:
    """Whether two answers are the same words; None where neither (as `latex.tidy` leaves them) is words."""
    choices = _choice(left), _choice(right)
    if None not in choices:
        return _same_choice(left, right, *map(str, choices))
    if not (_is_words(left) or _is_words(right)):
        return None
    return spelled(left) == spelled(right) if not _all_capitals(left, right) else _plain(left) == _plain(right)


def spelled(text: str) -> str:
    """Returns `text` in the spelling that words are compared in: lower case, single spaces, no commas."""
    return re.sub(r"[\s,]+", " ", _plain(text)).casefold().strip(" .")


def _same_choice(left: str, right: str, ours: str, theirs: str) -> bool:
    """x is not X, but a choice that is marked as one, like (B), may be written either way."""
    return ours == theirs or (ours.casefold() == theirs.casefold() and (_is_marked(left) or _is_marked(right)))


def _choice(text: str) -> str | None:
    """The letter of a choice, with or without what it says."""
    plain = _plain(text)
    match = _CHOICE.fullmatch(plain) or _CHOSEN.fullmatch(plain)
    return next(filter(None, match.groups())) if match else None


def _is_marked(text: str) -> bool:
    """Whether a letter is plainly that of a choice: in text, in brackets, or with what it says."""
    plain = _plain(text)
    return plain != text.strip() or len(plain) > 1


def _all_capitals(left: str, right: str) -> bool:
    return bool(_CAPITALS.fullmatch(_plain(left)) and _CAPITALS.fullmatch(_plain(right)))


def _is_words(text: str) -> bool:
    if "\\" not in text and not any(letter.isalpha() for letter in text):
        return False
    plain = _plain(text)
    if "\\" in plain or re.search(r"[=<>+*/^_{}|]", plain) or not _SENTENCE.fullmatch(plain):
        return False
    if len(plain) == 1:
        return plain != text.strip()
    capitals = _CAPITALS.fullmatch(plain) is not None
    name = plain[0].isupper() and plain[1:].islower()
    return capitals or name or plain != text.strip() or " " in plain or len(plain) > _LONGEST_PRODUCT or plain in _SHORT


def _plain(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip().strip("*").strip()
