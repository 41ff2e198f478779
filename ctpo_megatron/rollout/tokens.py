"""Token ids of text in which a template's special tokens and other people's words stand side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ctpo_megatron.errors import RenderError

# A noncharacter, which Unicode keeps for the inner use of programs. It stands in names of special tokens that somebody wrote
# into a message, so that only the template's own are special.
MARK = "\ufdd0"


class Tokens:
    """A tokenizer, and which text is special to it. `ends` are ids of stop tokens, special or not."""

    def __init__(self, tokenizer: Any, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        named = {tokenizer.decode([id_], skip_special_tokens=False): id_ for id_ in ends}
        self.ends = {name: id_ for name, id_ in named.items() if name}  # an id outside of the vocabulary has no text
        names = [token.content for id_, token in added if token.special or id_ in ends]
        self._special = _any_of(names)
        self._end = _any_of(list(self.ends))

    def ids(self, text: str) -> list[int]:
        """Ids of a template's text. Where names of special tokens bear a mark, what stands around them is plain text."""
        if MARK not in text:
            return self._encode(text)
        ids: list[int] = []
        run = ""
        for piece in re.split(f"({self._special.pattern})", text):
            if MARK in piece:
                ids += [*self._encode(run), *self.plain_ids(piece.replace(MARK, ""))]
                run = ""
            else:
                run += piece
        return [*ids, *self._encode(run)]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of ids of each text; many at once are quicker than one by one."""
        if any(MARK in text for text in texts):
            return [len(self.ids(text)) for text in texts]
        encoded = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def ids_after(self, before: str, text: str) -> list[int]:
        """Ids of `text` where it follows `before`; where a token would reach over the seam, those of `text` alone."""
        starts = [found.start() for found in self._special.finditer(before)]
        context = before[starts[-1] :] if starts else before
        known, whole = self.ids(context), self.ids(context + text)
        return whole[len(known) :] if whole[: len(known)] == known else self.ids(text)

    def plain_ids(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text, names of special tokens too."""
        return self._encode(text, plain=True)

    def find_end(self, text: str) -> re.Match[str] | None:
        """The first stop token in `text`."""
        return self._end.search(text)

    def mark(self, value: Any) -> Any:
        """`value`, text or anything that holds text, with a mark in every name of a special token. Raises RenderError."""
        if isinstance(value, str):
            if MARK in value:
                raise RenderError("a message holds the character U+FDD0, which no text may hold; remove it")
            return self._special.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", value)
        if isinstance(value, dict):
            return {key: self.mark(each) for key, each in value.items()}
        return [self.mark(each) for each in value] if isinstance(value, list | tuple) else value

    def _encode(self, text: str, *, plain: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)

    def specials(self, text: str) -> list[str]:
        """Names of the special tokens in `text`, in order."""
        return self._special.findall(text)


def _any_of(names: list[str]) -> re.Pattern[str]:
    """A pattern of any of `names`, the longest first; of nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
