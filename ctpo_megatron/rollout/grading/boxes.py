r"""The answer in a text: the content of its last \boxed{}."""

from __future__ import annotations

BOX = "\\boxed{"


def last_box(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} whose braces balance, None without one."""
    start = text.rfind(BOX)
    while start >= 0:
        begin = start + len(BOX)
        end = closing(text, begin)
        if end is not None:
            return text[begin:end].strip()
        start = text.rfind(BOX, 0, start)
    return None


def closing(text: str, begin: int) -> int | None:
    """Returns the place of the brace that closes the one before `begin`, None without one."""
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return None
