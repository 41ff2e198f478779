r"""What an answer is made of: a single value, or a list, tuple, set, interval, union or matrix of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ctpo_megatron.rollout.grading.latex import tidy

_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d)")
_NO_NUMBERS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})*,0\d\d(?:,\d{3})*(?!\d)")  # 1,000: no number is written 000
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{(?P<kind>[pb]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(?P<body>.*)\\end\{(?P=kind)\}\s*[)\]]?",
    re.DOTALL,
)
_OPENING, _ENDING = "([{", ")]}"
_CHAIN = re.compile(r"(?P<low>[^<>]+?)(?P<first><|\\le )(?P<name>[^<>\\]+?)(?P<second><|\\le )(?P<high>[^<>]+)")
_SINGLE = re.compile(r"(?P<left>[^<>]+?)\s*(?P<sign><|>|\\le |\\ge )\s*(?P<right>[^<>]+)")
_BUILT = re.compile(r"[a-zA-Z](?:\s*\\in ?(?:\\mathbb\{R\}|R))?\s*[|:]\s*(?P<condition>.+)", re.DOTALL)
_MEMBER = re.compile(r"(?P<name>[^=\\]+?)\s*\\in (?P<of>.+)", re.DOTALL)
_NAME = re.compile(
    r"""\|[a-zA-Z]{1,3}\|                                # a length, |AB|
    |\((?:[a-z],\ ?)+[a-z]\)                              # (x, y)
    |\\text\{[^{}]*\}                                     # \text{Area}
    |(?:\\[a-zA-Z]+[ ]?)?\{?(?:[a-zA-Z]{1,3}|[a-zA-Z ]*)\}?'*  # x, AB, \overline{AB}, \angle ABC, y', Area
     (?:_\{?\w+\}?)?(?:\([^()=]*\)|\^\{-1\}\([a-z]\))?    # a_n, f(x), f^{-1}(x)
    """,
    re.VERBOSE,
)
_POINT = re.compile(r"([A-Z]'?) ?(?=\()")  # A(1, 2)
_LETTER = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?")
_COMMANDS = re.compile(r"\\(?:frac|sqrt|cdot|times|pi|left|right|binom|sin|cos|tan|log|ln)(?![a-zA-Z])")
MAX_NESTING = 50  # brackets within brackets; a text with more is no list of anything
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


@dataclass(frozen=True)
class Value:
    """One number, expression, word or relation, as LaTeX."""

    text: str


@dataclass(frozen=True)
class Equation:
    """What a name equals: x = 3. Without the name it is its right side."""

    name: str
    right: Answer
    text: str


@dataclass(frozen=True)
class Calculation:
    """Values that are said to be equal, without a name: 3 \\times 4 = 12. Where they are, it is each of them."""

    sides: tuple[Answer, ...]


@dataclass(frozen=True)
class Ratio:
    """1:2:3, which 2:4:6 is too."""

    terms: tuple[str, ...]


@dataclass(frozen=True)
class Sequence:
    """A bare list (3, 4: in any order), a tuple (its order counts) or a set (no order, nothing counted twice)."""

    kind: Literal["list", "tuple", "set"]
    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Interval:
    """Numbers between `low` and `high`. (1, 2) is read as a tuple, which an open interval equals."""

    low: Value
    high: Value
    closed: tuple[bool, bool]
    name: str = ""  # of the variable, where it was written as an inequality


@dataclass(frozen=True)
class Union:
    """Intervals and sets joined by \\cup, in any order."""

    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple[Answer, ...], ...]


Answer = Value | Equation | Calculation | Ratio | Sequence | Interval | Union | Matrix


@lru_cache(maxsize=1024)
def read_answer(text: str) -> Answer:
    """Returns what `text` is made of."""
    text = tidy(text)
    return _read(text) if _nesting(text) <= MAX_NESTING else Value(text)


def _nesting(text: str) -> int:
    """How many brackets are open at once, at most."""
    depth = deepest = 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _ENDING)
        deepest = max(deepest, depth)
    return deepest


def split(text: str, separators: str) -> list[str]:
    """Returns the parts of `text` between `separators` that stand outside all brackets; [text] where brackets do not balance."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        if letter in _OPENING:
            depth += 1
        elif letter in _ENDING:
            depth -= 1
        elif letter in separators and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]


def _read(text: str, *, inside: bool = False) -> Answer:
    """`inside`: within brackets, where a comma separates even groups of digits."""
    if matrix := _MATRIX.fullmatch(text):
        return _matrix(matrix["body"])
    text = _ungrouped(text, inside)
    parts = split(text, ",;")
    if len(parts) > 1 and all(parts):
        items = tuple(_shared_name(parts))
        if ";" in text and all(isinstance(item, Interval) and item.name for item in items):  # x < 1 or x > 2
            return Union(items)
        return Sequence("list", items)
    if "\\cup" in text and len(pieces := split(text.replace("\\cup", "\x00"), "\x00")) > 1:
        return Union(tuple(_read(piece) for piece in pieces))
    if (bracketed := _bracketed(text)) is not None:
        return bracketed
    if (point := _POINT.match(text)) and isinstance(place := _bracketed(text[point.end() :]), Sequence):
        return Equation(point[1], place, text)
    return _plus_minus(text) or _ratio(text) or _relation(_without_approximation(text)) or Value(_without_approximation(text))


def _ungrouped(text: str, inside: bool) -> str:
    """`text` without the commas between groups of digits.

    Where another comma has a space behind it, it separates, and those without one join. Where none has, they join if all of them
    stand between groups of three digits. Within brackets commas separate, unless a group starts with 0.
    """
    if "," in text:
        if inside or text[0] in _OPENING or text.startswith("\\{"):
            text = _NO_NUMBERS.sub(_joined, text)
        elif not any(letter in text for letter in "()[]"):
            without = _THOUSANDS.sub(_joined, text)
            if ", " in text or ";" in text or "," not in without:
                text = without
    return text.replace("{,}", "")


def _joined(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


def _shared_name(parts: list[str]) -> list[Answer]:
    """The parts of a list; in x = 1, 2 both are values of x."""
    items = [_read(part) for part in parts]
    if isinstance(items[0], Equation) and not any(isinstance(item, Equation) for item in items[1:]):
        name = items[0].name
        return [items[0], *(Equation(name, item, f"{name}={part}") for item, part in zip(items[1:], parts[1:], strict=True))]
    return items


def _bracketed(text: str) -> Answer | None:
    """A set, tuple or interval, or what a pair of brackets around all of it holds; None where none surrounds all of it."""
    if text.startswith("\\{") and text.endswith("\\}") and _surrounds(text, 1):
        inside = text[2:-2].strip()
        if built := _BUILT.fullmatch(inside):
            return _read(built["condition"])
        return Sequence("set", tuple(_items(inside))) if inside else None
    if not text or text[0] not in "([{" or text[-1] not in ")]}" or not _surrounds(text, 0):
        return None
    parts = split(inside := text[1:-1], ",;")
    if not all(parts):
        return None
    if len(parts) == 1:
        return _read(inside, inside=True) if text[0] + text[-1] in ("()", "{}") else None
    if text[0] == "{":
        return Sequence("set", tuple(_items(inside)))
    if len(parts) == 2 and text[0] + text[-1] != "()":
        return Interval(Value(parts[0]), Value(parts[1]), (text[0] == "[", text[-1] == "]"))
    return Sequence("tuple", tuple(_items(inside)))


def _items(inside: str) -> list[Answer]:
    found = [_read(part, inside=True) for part in split(inside, ",;")]
    spread: list[Answer] = []
    for item in found:
        spread += item.items if isinstance(item, Sequence) and item.kind == "list" else [item]
    return spread


def _surrounds(text: str, begin: int) -> bool:
    """Whether the bracket at `begin` is closed by the last character, and none before. Half-open intervals mix two kinds."""
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] in _OPENING) - (text[place] in _ENDING)
        if depth == 0:
            return place == len(text) - 1
    return False


def _matrix(body: str) -> Matrix:
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr", body.replace("\\hline", "")) if row.strip()]
    return Matrix(tuple(tuple(_read(tidy(entry)) for entry in split(row, "&")) for row in rows))


def _plus_minus(text: str) -> Sequence | None:
    """The two values of a \\pm b."""
    if text.count("\\pm") != 1 or "=" in text or "\\mp" in text:
        return None
    before, after = (part.strip() for part in text.split("\\pm"))
    return Sequence("list", tuple(_read(f"{before}{sign}{after}".removeprefix("+")) for sign in "+-"))


def _ratio(text: str) -> Ratio | None:
    """The terms of a:b:c. Two terms are a quotient, which SymPy reads."""
    parts = split(text, ":")
    return Ratio(tuple(parts)) if len(parts) > 2 and all(parts) else None


def _relation(text: str) -> Answer | None:
    """An equation with a name on its left, or an interval for an inequality of one letter; None for all else."""
    member = _MEMBER.fullmatch(text)
    if member is not None and _LETTER.fullmatch(name := member["name"].strip()):
        return _open(_read(member["of"]), name)
    sides = split(text, "=")
    if len(sides) > 1 and all(sides) and not re.search(r"[<>]|\\[lgn]e ", text):
        return _equation(sides, text)
    chain = _CHAIN.fullmatch(text)
    if chain is not None and _LETTER.fullmatch(name := chain["name"].strip()):
        closed = (chain["first"].strip() == "\\le", chain["second"].strip() == "\\le")
        return Interval(Value(chain["low"].strip()), Value(chain["high"].strip()), closed, name)
    if single := _SINGLE.fullmatch(text):
        return _half_line(single["left"].strip(), single["sign"].strip(), single["right"].strip())
    return None


def _without_approximation(text: str) -> str:
    """`text` without what an exact value is said to be near; behind a name \\approx is an equals sign."""
    exact, near, _ = text.partition("\\approx")
    if not near:
        return text
    return text.replace("\\approx ", "=").replace("\\approx", "=") if _NAME.fullmatch(exact.strip()) else exact.strip()


def _equation(sides: list[str], text: str) -> Answer | None:
    if len(sides) == 2 and _LETTER.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]):  # 3 = x
        sides = sides[::-1]
    if not any(re.search(r"[a-zA-Z]", _COMMANDS.sub("", side)) for side in sides):
        return Calculation(tuple(map(_read, sides)))
    if not _NAME.fullmatch(sides[0]):
        return None
    right = _read(sides[-1])
    if isinstance(right, Sequence) and right.kind == "list":  # x = \pm 2
        return Sequence("list", tuple(Equation(sides[0], item, text) for item in right.items))
    return Equation(sides[0], right, text)


def _half_line(left: str, sign: str, right: str) -> Interval | None:
    if _LETTER.fullmatch(right) and not _LETTER.fullmatch(left):
        left, sign, right = right, FLIPPED[sign], left
    if not _LETTER.fullmatch(left) or _LETTER.fullmatch(right):
        return None
    closed, infinite = sign in ("\\le", "\\ge"), Value("\\infty")
    if sign in ("<", "\\le"):
        return Interval(Value("-\\infty"), Value(right), (False, closed), left)
    return Interval(Value(right), infinite, (closed, False), left)


def _open(found: Answer, name: str) -> Answer:
    """What `name` lies in; between parentheses it is an interval, and with its name it is no tuple."""
    if isinstance(found, Sequence) and found.kind == "tuple" and len(found.items) == 2:
        low, high = found.items
        if isinstance(low, Value) and isinstance(high, Value):
            return Interval(low, high, (False, False), name)
    if isinstance(found, Interval):
        return Interval(found.low, found.high, found.closed, name)
    return found
