"""Whether two answers are equal, part by part. What is not decided by how it is written is asked of `mathematics`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from ctpo_megatron.rollout.grading.numerals import Numeral, close, plain_numerals, read_numeral
from ctpo_megatron.rollout.grading.quantities import DEGREE, PERCENT, Quantity, read_quantity
from ctpo_megatron.rollout.grading.structure import (
    Answer,
    Calculation,
    Equation,
    Interval,
    Matrix,
    Ratio,
    Sequence,
    Union,
    Value,
    read_answer,
)
from ctpo_megatron.rollout.grading.words import same_words

Mathematics = Callable[[str, str], bool]
_SET = re.compile(r"[<>]|\\(?:[lgn]e|begin|mathbb|setminus|backslash|cap|emptyset) ?(?![a-z])")
MAX_ITEMS = 64  # of a list without an order, whose items are compared each with each


def equal(answer: str, given: str, mathematics: Mathematics) -> bool:
    """Whether two answers, without their boxes, are equal. The order of the two does not matter.

    `mathematics` compares two single LaTeX expressions.
    """
    left, right = read_answer(answer), read_answer(given)
    return _Comparison(mathematics).same(left, right)


class _Comparison:
    """Compares what was read, with one way to do mathematics."""

    def __init__(self, mathematics: Mathematics) -> None:
        self._mathematics = mathematics

    def same(self, left: Answer, right: Answer) -> bool:
        """Whether two answers of any structure are equal."""
        match left, right:
            case Value(), Value():
                return self._values(left.text, right.text)
            case (Calculation(sides), other) | (other, Calculation(sides)):
                return all(self.same(side, sides[-1]) for side in sides[:-1]) and self.same(sides[-1], other)
            case Matrix(), Matrix():
                return self._matrices(left, right)
            case Equation(), Equation():
                return self._equations(left, right)
            case Ratio(), Ratio():
                return self._ratios(left.terms, right.terms)
            case Sequence(), Sequence():
                return self._sequences(left, right)
            case Interval(), Interval():
                return self._intervals(left, right)
            case Union(), Union():
                return self._unordered(left.items, right.items) or self._as_text(left, right)
            case (Equation(text=text), Value(other)) | (Value(other), Equation(text=text)) if "=" in other:
                return self._mathematics(text, other)
            case (Sequence(kind="list", items=items), Value(letters)) | (Value(letters), Sequence(kind="list", items=items)):
                return _same_choices(items, letters)
            case (Equation(), _) | (_, Equation()):
                return self.same(_without_name(left), _without_name(right))
            case (Interval(), Sequence()) | (Sequence(), Interval()):
                return self._interval_and_pair(left, right)
            case (Sequence(kind="set", items=(one,)), Value() as other) | (Value() as other, Sequence(kind="set", items=(one,))):
                return self.same(one, other)
            case (_, Value(text)) | (Value(text), _) if re.search(_SET, text):
                return self._as_text(left, right)
            case (Sequence(), Union()) | (Union(), Sequence()):
                return self._as_text(left, right)
        return False

    def _values(self, left: str, right: str) -> bool:
        if _spaceless(left) == _spaceless(right):
            return bool(left)
        if (verdict := same_words(left, right)) is not None:
            return verdict
        ours, theirs = read_quantity(left), read_quantity(right)
        unit, other = ours.unit, theirs.unit
        if unit == other:
            return self._amounts(ours.amount, theirs.amount)
        if unit is not None and other is not None:
            return self._converted(ours, theirs)
        if self._amounts(ours.amount, theirs.amount):
            return True
        return any(self._without_sign(each, rest) for each, rest in ((ours, theirs), (theirs, ours)))

    def _without_sign(self, signed: Quantity, plain: Quantity) -> bool:
        """Whether `plain`, which has no unit, is the percentage `signed` as a share of one, or its degrees in radians."""
        kind = None if signed.unit is None else signed.unit.kind
        if kind == PERCENT:
            return self._amounts(plain.amount, signed.amount, factor=Fraction(1, 100))
        return kind == DEGREE and self._amounts(plain.amount, _radians(signed))

    def _amounts(self, left: str, right: str, *, factor: Fraction = Fraction(1)) -> bool:
        """Whether left = right times `factor`."""
        ours, theirs = read_numeral(left), read_numeral(right)
        if ours is not None and theirs is not None:
            return close(ours, Numeral(theirs.value * factor, theirs.rounded))
        if not left or not right:
            return False
        scaled = right if factor == 1 else f"({right})\\cdot\\frac{{{factor.numerator}}}{{{factor.denominator}}}"
        return self._mathematics(exact(left, ours), exact(scaled, theirs if factor == 1 else None))

    def _converted(self, left: Quantity, right: Quantity) -> bool:
        if left.unit is None or right.unit is None:
            return False
        kinds = {left.unit.kind, right.unit.kind}
        if len(kinds) == 1:
            return self._amounts(left.amount, right.amount, factor=right.unit.factor / left.unit.factor)
        if kinds == {DEGREE, "angle"}:
            return self._amounts(_radians(left), _radians(right))
        return False

    def _equations(self, left: Equation, right: Equation) -> bool:
        if left.name.replace(" ", "") == right.name.replace(" ", ""):
            return self.same(left.right, right.right)
        return isinstance(left.right, Value) and isinstance(right.right, Value) and self._mathematics(left.text, right.text)

    def _ratios(self, left: tuple[str, ...], right: tuple[str, ...]) -> bool:
        if len(left) != len(right):
            return False
        crossed = ((f"({one})\\cdot({right[0]})", f"({other})\\cdot({left[0]})") for one, other in zip(left, right, strict=True))
        return all(self._mathematics(*pair) for pair in crossed)

    def _sequences(self, left: Sequence, right: Sequence) -> bool:
        kinds = {left.kind, right.kind}
        if kinds == {"tuple", "set"}:
            return False
        named = [_distinct_names(each) for each in (left, right)]
        ordered = "tuple" in kinds or named[0] != named[1]  # x = 1, y = 2 against 1, 2
        if ordered:
            return len(left.items) == len(right.items) and all(map(self.same, left.items, right.items))
        if "set" in kinds:
            return self._covers(left.items, right.items) and self._covers(right.items, left.items)
        return self._unordered(left.items, right.items)

    def _unordered(self, left: tuple[Answer, ...], right: tuple[Answer, ...]) -> bool:
        """Whether the items match one to one, in any order."""
        if len(left) != len(right) or len(left) > MAX_ITEMS:
            return False
        rest = list(right)
        for item in left:
            place = next((place for place, other in enumerate(rest) if self.same(item, other)), None)
            if place is None:
                return False
            del rest[place]
        return True

    def _covers(self, left: tuple[Answer, ...], right: tuple[Answer, ...]) -> bool:
        """Whether every item of `left` is one of `right`."""
        return max(len(left), len(right)) <= MAX_ITEMS and all(any(self.same(one, other) for other in right) for one in left)

    def _matrices(self, left: Matrix, right: Matrix) -> bool:
        if [len(row) for row in left.rows] != [len(row) for row in right.rows]:
            return False
        return all(self.same(*pair) for rows in zip(left.rows, right.rows, strict=True) for pair in zip(*rows, strict=True))

    def _intervals(self, left: Interval, right: Interval) -> bool:
        names = {left.name, right.name} - {""}
        return (
            left.closed == right.closed and len(names) < 2 and self.same(left.low, right.low) and self.same(left.high, right.high)
        )

    def _interval_and_pair(self, left: Answer, right: Answer) -> bool:
        interval, pair = (left, right) if isinstance(left, Interval) else (right, left)
        if not isinstance(interval, Interval) or not isinstance(pair, Sequence) or pair.kind != "tuple" or len(pair.items) != 2:
            return False
        return (
            interval.closed == (False, False)
            and self.same(interval.low, pair.items[0])
            and self.same(interval.high, pair.items[1])
        )

    def _as_text(self, left: Answer, right: Answer) -> bool:
        """Two descriptions of a set, of which math-verify may know whether they are the same."""
        return self._mathematics(written(left), written(right))


def written(answer: Answer) -> str:
    """Returns `answer` as LaTeX again."""
    match answer:
        case Value(text) | Equation(text=text):
            return text
        case Calculation(sides):
            return "=".join(map(written, sides))
        case Ratio(terms):
            return ":".join(terms)
        case Sequence(kind, items):
            opening, ending = {"set": ("\\{", "\\}"), "tuple": ("(", ")"), "list": ("", "")}[kind]
            return opening + ",".join(map(written, items)) + ending
        case Interval(low, high, closed):
            return f"{'[' if closed[0] else '('}{low.text},{high.text}{']' if closed[1] else ')'}"
        case Union(items):
            return "\\cup ".join(map(written, items))
        case Matrix(rows):
            return "\\begin{pmatrix}" + "\\\\".join("&".join(map(written, row)) for row in rows) + "\\end{pmatrix}"


def exact(text: str, number: Numeral | None) -> str:
    """`text`, or the fraction that it was read as: SymPy would read 1 1/2 and 1.5e3 as products."""
    if number is None or number.rounded or re.fullmatch(r"-?\d+", text):
        return plain_numerals(text)
    value = number.value
    return str(value.numerator) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _same_choices(items: tuple[Answer, ...], letters: str) -> bool:
    """Whether a run of letters, ABD, is the choices of a list: A, B, D."""
    chosen = [item.text.strip("()") for item in items if isinstance(item, Value)]
    return (
        len(chosen) == len(items)
        and all(re.fullmatch("[A-Z]", choice) for choice in chosen)
        and sorted(chosen) == sorted(letters)
    )


def _spaceless(text: str) -> str:
    """`text` without the spaces that say nothing: those before a command, and between a command and what is no letter."""
    return re.sub(r" (?=\\)|(?<=[^\w}]) | (?=[^\w\\({])", "", text)


def _without_name(answer: Answer) -> Answer:
    return answer.right if isinstance(answer, Equation) else answer


def _distinct_names(sequence: Sequence) -> bool:
    """Whether these are values of several variables."""
    names = [item.name for item in sequence.items if isinstance(item, Equation)]
    return len(names) == len(sequence.items) and len(set(names)) > 1


def _radians(quantity: Quantity) -> str:
    """Degrees as radians; another angle as it is."""
    if quantity.unit is not None and quantity.unit.kind == DEGREE:
        return f"({quantity.amount})\\cdot\\frac{{\\pi}}{{180}}"
    return quantity.amount
