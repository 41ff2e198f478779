r"""Quantities: a number or expression, and the unit, percent or degree sign behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

PERCENT = "percent"
DEGREE = "degree"


@dataclass(frozen=True)
class Unit:
    """What is measured (`kind`, like a length), and how many of the kind's first unit one of it is."""

    kind: str
    factor: Fraction
    power: int = 1


@dataclass(frozen=True)
class Quantity:
    """`amount` is LaTeX; `unit` is None where none was written. A kind that starts with ? is a word that is no known unit."""

    amount: str
    unit: Unit | None


_KINDS: dict[str, dict[str, Fraction | int | str]] = {
    "length": {
        "m meter meters metre metres": 1, "cm centimeter centimeters centimetre centimetres": "0.01",
        "mm millimeter millimeters millimetre millimetres": "0.001", "km kilometer kilometers kilometre kilometres": 1000,
        "dm decimeter decimeters": "0.1", "in inch inches": "0.0254", "ft foot feet": "0.3048", "yd yard yards": "0.9144",
        "mi mile miles": "1609.344",
    },
    "mass": {"kg kilogram kilograms": 1, "g gram grams": "0.001", "mg milligram milligrams": "0.000001",
             "lb lbs pound pounds": "0.45359237", "oz ounce ounces": "0.028349523125",
             "tonne tonnes": 1000, "ton tons": "907.18474"},
    "time": {"s sec secs second seconds": 1, "min mins minute minutes": 60, "h hr hrs hour hours": 3600, "day days": 86400,
             "week weeks": 604800, "month months": 2629800, "year years yr yrs": 31557600},
    "volume": {"l L liter liters litre litres": 1, "mL ml milliliter milliliters": "0.001", "gal gallon gallons": "3.785411784",
               "cup cups": "0.2365882365"},
    "dollars": {"$ dollar dollars USD": 1, "cent cents ¢": "0.01"},
    "euros": {"€ euro euros EUR": 1}, "pounds sterling": {"£ GBP": 1}, "rupees": {"₹ rupee rupees Rs": 1}, "yuan": {"yuan": 1},
    "speed": {"km/h kmh kmph kph": 1, "mph": "1.609344", "m/s": "3.6"},
    "units": {"unit units": 1},
    "temperature in C": {"°C celsius Celsius": 1}, "temperature in F": {"°F fahrenheit Fahrenheit": 1},
    "angle": {"rad radian radians": 1},
    "force": {"N newton newtons": 1}, "energy": {"J joule joules": 1, "kJ": 1000}, "power": {"W watt watts": 1, "kW": 1000},
}  # fmt: skip
_UNITS = {
    name: Unit(kind, Fraction(factor))
    for kind, names in _KINDS.items()
    for group, factor in names.items()
    for name in group.split()
}
_UNITS[DEGREE] = _UNITS["degrees"] = _UNITS["deg"] = Unit(DEGREE, Fraction(1))
_SPEEDS = {"miles per hour": "mph", "mi/h": "mph", "miles/hour": "mph", "kilometers per hour": "km/h", "km/hr": "km/h",
           "km per hour": "km/h", "meters per second": "m/s", "kilometres per hour": "km/h"}  # fmt: skip
_SYMBOLS_THAT_ARE_LETTERS = {"m", "g", "s", "h", "l", "L", "N", "J", "W"}  # behind a number only in \text{} or after a space
_MONEY = re.compile(r"(-?)\s*(\\\$|\$|€|£|₹|\\text\{\s*\\?\$\s*\})\s*(.+)")
_TEXT_UNIT = re.compile(r"(?P<amount>.*[\d)}a-zA-Z])\s*\\text\{(?P<unit>[^{}\\]*)\}\s*(?:\^\{?(?P<power>\d)\}?)?", re.DOTALL)
# words that change the number before them: 3 squared is 9, and "4 times" alone is a count
_CALCULATES = re.compile(
    r"(?:squared|cubed|factorial|halves|thirds|fourths|fifths|times \S|(?:plus|minus|over|choose|not|if|when)\b).*", re.DOTALL
)
_UNIT_NAME = re.compile(r"[^\W\d_][^\d,;]{0,40}[23]?|[$€£₹¢°]\w?")  # no second number, as in 12 \text{ or 13}
_WORD_UNIT = re.compile(
    r"(?P<amount>.*[\d)}])(?P<gap>\s*)(?P<unit>[a-zA-Z$€£₹¢][a-zA-Z/ .]*)(?:\^\{?(?P<power>\d)\}?)?", re.DOTALL
)
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_DEGREES = re.compile(r"(?P<amount>.*)\^\\circ\s*(?:\\text\{\s*)?(?P<scale>[CF]?)(?:\s*\})?", re.DOTALL)


def read_quantity(text: str) -> Quantity:
    """Returns what `text` (as `latex.tidy` leaves it) measures, without a unit where it has none."""
    text = text.strip()
    if not text or (text[-1].isdigit() and text[0] in "0123456789-+." and "^" not in text):
        return Quantity(text, None)
    if text.endswith("%") and len(text) > 1:
        return Quantity(text[:-1].strip(), Unit(PERCENT, Fraction(1, 100)))
    if money := _MONEY.fullmatch(text):
        sign, symbol, amount = money.groups()
        symbol = "$" if "$" in symbol else symbol
        return Quantity(sign + read_quantity(amount).amount, _UNITS[symbol])
    degrees = _DEGREES.fullmatch(text)
    if degrees is not None and degrees["amount"].strip() and not _FUNCTION.search(degrees["amount"]):
        scale = degrees["scale"]
        return Quantity(degrees["amount"].strip(), _UNITS[f"°{scale}"] if scale else _UNITS[DEGREE])
    return _with_words(text)


def _with_words(text: str) -> Quantity:
    match = _TEXT_UNIT.fullmatch(text)
    if match is not None:
        name = match["unit"].strip()
        if not _UNIT_NAME.fullmatch(name) or _CALCULATES.fullmatch(name) or not _measurable(match["amount"]):
            return Quantity(text, None)
        return Quantity(match["amount"].strip(), _unit(match["unit"], match["power"]))
    match = _WORD_UNIT.fullmatch(text)
    if match is None or not _measurable(match["amount"]):
        return Quantity(text, None)
    name = match["unit"].strip()
    if _CALCULATES.fullmatch(name):
        return Quantity(text, None)
    unit = _unit(name, match["power"])
    known = not unit.kind.startswith("?") and (match["gap"] or name not in _SYMBOLS_THAT_ARE_LETTERS)
    if known and len(name) == 1 and name.isalpha() and not match["amount"].strip()[-1].isdigit():
        known = False
    return Quantity(match["amount"].strip(), unit) if known or len(name) > 3 else Quantity(text, None)


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace(".", " ") if "sq." in text or "cu." in text else text.replace(".", "")).strip()


def _measurable(amount: str) -> bool:
    """Whether an amount of a unit may be this: it has a number or a letter of LaTeX, and no text."""
    return "\\text" not in amount and (any(c.isdigit() for c in amount) or "\\" in amount)


def _unit(words: str, power: str | None) -> Unit:
    name = _words(words)
    name = _SPEEDS.get(name, name)
    exponent = int(power or 1)
    found = re.fullmatch(r"(?P<how>square|sq\.?|cubic|cu\.?) (?P<name>.+)", name)
    if found is not None:
        exponent, name = (2 if found["how"].startswith("s") else 3), found["name"]
    squared = re.fullmatch(r"(?P<name>[a-zA-Z]+)\s*(?:\^|squared|cubed)?(?P<digit>[23]?)", name)
    if squared is not None and squared["digit"]:
        exponent, name = int(squared["digit"]), squared["name"]
    if name.endswith((" squared", " cubed")):
        exponent, name = (2 if name.endswith(" squared") else 3), name.rsplit(" ", 1)[0]
    unit = _UNITS.get(name) or _UNITS.get(name.lower())
    if unit is None:
        return Unit("?" + name.lower().removesuffix("s"), Fraction(1))
    if unit.kind == "length" and exponent == 3:
        return Unit("volume", unit.factor**3 * 1000)
    return Unit(unit.kind if exponent == 1 else f"{unit.kind}^{exponent}", unit.factor**exponent, exponent)
