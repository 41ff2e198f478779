r"""Numbers as they are written, read exactly: 1,234, 3 1/2, 2\frac{1}{3}, 0.\overline{3}, 1.5 \times 10^{-7}, 1011_2."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
MAX_DIGITS = 400  # of an exponent's power of ten; beyond it a number is left to the judge, which has limits

_SIGN = r"(?P<sign>[+-]?)"
_PLAIN = r"\d+(?:\.\d*)?|\.\d+"
_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:\.\d+)?"
_TIMES = r"(?:\\times|\\cdot|\*)"
_NUMBER = re.compile(rf"{_SIGN}(?P<digits>{_GROUPED}|{_PLAIN})")
_REPEATING = re.compile(
    rf"{_SIGN}(?P<whole>\d*)\.(?P<start>\d*)(?:\\(?:overline|bar|dot){{(?P<cycle>\d+)}}|\((?P<brackets>\d+)\))"
)
_SCIENTIFIC = re.compile(
    rf"{_SIGN}(?P<digits>{_PLAIN})(?:[eE]|{_TIMES}10\^|{_TIMES}10\*\*)(?:{{(?P<braced>[+-]?\d+)}}|\(?(?P<exponent>[+-]?\d+)\)?)"
)
_POWER_OF_TEN = re.compile(rf"{_SIGN}10\^(?:{{(?P<braced>[+-]?\d+)}}|(?P<exponent>[+-]?\d+))")
_RATIO = re.compile(
    rf"{_SIGN}(?:(?P<whole>\d+)[ +]?)??(?:\\frac{{(?P<over>-?(?:{_PLAIN}))}}{{(?P<under>-?(?:{_PLAIN}))}}"
    rf"|(?P<left>{_GROUPED}|{_PLAIN})/(?P<right>{_GROUPED}|{_PLAIN}))"
)
_BASED = re.compile(
    r"(?P<sign>-?)\(?(?P<digits>[0-9A-Fa-f]*\d[0-9A-Fa-f]*(?: [0-9A-Fa-f]+)*|[A-F]{2,})\)?"
    r"(?:_\{?\(?(?:\\text\{(?:base )?(?P<word>\w+)\}|(?:base )?(?P<base>\d+))\)?\}?"
    r"| ?\(? ?(?:\\text\{ ?)?base ?\}?(?P<named>\d+)\)?)"
)
_WITHIN = re.compile(r"(?<![\w.\\{^])\d+(?:_(?:\d+|\{\d+\})| ?\\frac\{\d+\}\{\d+\})")
_DEGREES_WITHIN = re.compile(r"(\d+(?:\.\d+)?|(?<![a-zA-Z\\])[a-zA-Z])\^\\circ ?")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
          "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16}  # fmt: skip


@dataclass(frozen=True)
class Numeral:
    """A number's exact value. `rounded`: it was written as a decimal fraction, so it may stand for a value nearby."""

    value: Fraction
    rounded: bool


def read_numeral(text: str) -> Numeral | None:
    """Returns the number that `text` (as `latex.tidy` leaves it) writes out, None where it is anything else."""
    text = text.strip()
    if not text or not (text[-1].isdigit() or text[-1] in "}.)" or "_" in text):
        return None
    for read in (_plain, _ratio, _scientific, _repeating, _based):
        found = read(text)
        if found is not None:
            return found
    return None


def plain_numerals(text: str) -> str:
    """Returns the expression `text` with its mixed numbers, numbers of other bases and degrees as SymPy reads them.

    To SymPy 1 1/2 is a product, 1011_2 is 1011, and degrees are nothing.
    """

    def written(match: re.Match[str]) -> str:
        number = read_numeral(match[0])
        if number is None:
            return match[0]
        return f"\\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"

    if "_" in text or "\\frac" in text:
        text = _WITHIN.sub(written, text)
    return _DEGREES_WITHIN.sub(r"(\1\\cdot\\frac{\\pi}{180})", text) if "\\circ" in text else text


def close(left: Numeral, right: Numeral) -> bool:
    """Whether two numbers are equal: exactly where both are whole or written exactly, else within a millionth.

    The millionth is of the number where that is below 1, and absolute above: 1e-19 is not 9e-31, and 1234567.1 not 1234567.2.
    """
    if left.value == right.value:
        return True
    if not (left.rounded or right.rounded) or left.value == 0 or right.value == 0:
        return False
    largest = max(abs(left.value), abs(right.value))
    return abs(left.value - right.value) <= TOLERANCE * min(Fraction(1), largest)


def _plain(text: str) -> Numeral | None:
    match = _NUMBER.fullmatch(text)
    return None if match is None else _signed(match["sign"], _decimal(match["digits"]))


def _ratio(text: str) -> Numeral | None:
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    over, under = (_decimal(match[a] or match[b]) for a, b in (("over", "left"), ("under", "right")))
    if under.value == 0:
        return None
    value = over.value / under.value
    if match["whole"] is not None:
        if not 0 <= value < 1 or "." in text:  # no mixed number: 2 \frac{3}{2} may be a product
            return None
        value += int(match["whole"])
    return _signed(match["sign"], Numeral(value, over.rounded or under.rounded))


def _scientific(text: str) -> Numeral | None:
    compact = text.replace(" ", "")
    match = _SCIENTIFIC.fullmatch(compact)
    if match is None:
        match = _POWER_OF_TEN.fullmatch(compact)
    if match is None:
        return None
    exponent = int(match["braced"] or match["exponent"])
    if abs(exponent) > MAX_DIGITS:
        return None
    digits = Numeral(Fraction(1), False) if match.re is _POWER_OF_TEN else _decimal(match["digits"])
    value = digits.value * Fraction(10) ** exponent
    return _signed(match["sign"], Numeral(value, digits.rounded and value.denominator != 1))


def _repeating(text: str) -> Numeral | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    whole, start, cycle = match["whole"] or "0", match["start"], match["cycle"] or match["brackets"]
    value = Fraction(int(whole + start + cycle) - int(whole + start), (10 ** len(cycle) - 1) * 10 ** len(start))
    return _signed(match["sign"], Numeral(value, False))


def _based(text: str) -> Numeral | None:
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    named = match["word"] or match["base"] or match["named"]
    base = int(named) if named.isdigit() else _BASES.get(named, 0)
    if not 2 <= base <= 36:
        return None
    try:
        value = int(match["digits"].replace(" ", ""), base)
    except ValueError:  # a digit that the base lacks
        return None
    return _signed(match["sign"], Numeral(Fraction(value), False))


def _decimal(digits: str) -> Numeral:
    value = Fraction(digits.replace(",", "").replace(" ", ""))
    return Numeral(value, "." in digits and value.denominator != 1)


def _signed(sign: str, number: Numeral) -> Numeral:
    return Numeral(-number.value, number.rounded) if sign == "-" else number
