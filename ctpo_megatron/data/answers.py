"""A known answer as text: what a column holds, written as a person would write it."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import numpy as np

from ctpo_megatron.data.tables import quote
from ctpo_megatron.errors import DataError

# what pandas, Arrow, JavaScript and spreadsheets write where nothing is known
MISSING = ("nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NaT", "#N/A", "N/A", "n/a")
_WRAPPING = re.compile(r"\\boxed\s*\{|\\text\s*\{|\\[()\[\]]|[{}$\s\u200b-\u200d\u2060\ufeff]")  # characters of no width too
MAX_PLACES = 40  # a number of more digits is written with a power of ten


def answer_text(place: str, key: str, value: Any) -> str:
    """Returns the known answer as text: text as it is, numbers without exponents and with no more digits than they have.

    0.00001 rather than 1e-05, 10000000000000000 rather than 1e+16, 7 for 7.0, 7.5 for Decimal('7.50'). Python's, NumPy's and
    Arrow's numbers are taken. Raises DataError, naming `place` and `key`, for what is no answer: not a number, infinity, nothing,
    true and false, other types, and text that says one of `MISSING`.
    """
    where = f"{place}: {key!r} is {quote(value)}"
    value = _python_value(value)
    if isinstance(value, str):
        _check_text(where, value)
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal | np.floating):
        return _number_text(where, value)
    if value is None:
        raise DataError(f"{where}: a missing value is no answer. Give the answer, or remove the row.")
    if isinstance(value, bool):
        raise DataError(f"{where}; needed: the answer as text or a number. For a question of yes or no write it as text.")
    raise DataError(f"{where}; needed: the answer as text or a number")


def _check_text(where: str, text: str) -> None:
    bare = _WRAPPING.sub("", text)
    if not bare:
        raise DataError(f"{where}: blank text is no answer; needed: the answer as text or a number. Give it, or remove the row.")
    if bare in MISSING:
        raise DataError(
            f"{where}: that is how a missing value is written, and no answer. Give the answer, or remove the row; where the word "
            "itself is the answer, write it in another case, like 'none'."
        )


def _python_value(value: Any) -> Any:
    """What a scalar of Arrow or NumPy holds. NumPy's floats stay, since their width says how many digits they have."""
    if hasattr(value, "as_py"):
        value = value.as_py()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, np.integer | np.bool_ | np.str_):
        return value.item()
    return value


def _number_text(where: str, value: float | Decimal | np.floating[Any]) -> str:
    if math.isnan(value):
        raise DataError(
            f"{where}: not a number is no answer (a missing value in a column of numbers?). Give it, or remove the row."
        )
    if math.isinf(value):
        raise DataError(
            f"{where}: a column of numbers holds infinity where one was too large or divided by zero. Give the answer; where "
            r"it is infinity, write the text \infty."
        )
    number = value if isinstance(value, Decimal) else Decimal(_digits(value))
    if abs(number.adjusted()) > MAX_PLACES:
        return _scientific(number)
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def _digits(value: float | np.floating[Any]) -> str:
    """The fewest digits that tell `value` from its neighbours of the same width.

    A Python float that 32 bits hold exactly and whose digits stop short of its value was one: 0.10000000149011612 is 0.1. Where
    the digits are the value, as in 9536.7431640625 = 2.5 ** 10, somebody may have written them.
    """
    if isinstance(value, np.floating) and not isinstance(value, np.float64):
        return np.format_float_positional(value, trim="-")
    text = repr(float(value))
    if not float(value).is_integer() and Decimal(text) != Decimal(float(value)):
        with np.errstate(over="ignore", under="ignore"):
            single = np.float32(value)
        if float(single) == value:
            return np.format_float_positional(single, trim="-")
    return text


def _scientific(number: Decimal) -> str:
    digits, exponent = f"{number.normalize():e}".split("e")
    return f"{digits} \\times 10^{{{int(exponent)}}}"
