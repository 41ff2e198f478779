"""Whether two LaTeX expressions are equal, by SymPy's numbers and by math-verify.

Evaluating may hang or take all memory (think of 9^9^9^9): only `rollout.judge` calls this, in a process with limits.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

DIGITS = 30  # of every evaluation
TOLERANCE = 1e-6  # where a number was written as a decimal fraction
EXACT = 1e-20  # where none was: what 30 digits leave of rounding
SEED = 2605_07331
# of each sign and several sizes, so that expressions which agree near 0 only are told apart
SCALES = (1.0, 1.0, 3.0, 3.0, 10.0, 1000.0)
MOST_DIGITS = 1000  # to which two exact numbers that look equal are told apart
WHOLE = frozenset("nkm")  # letters of whole numbers
WHOLE_SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 20, 50)
ENOUGH = 3  # points at which both have values


def same_expression(answer: str, given: str) -> bool:
    """Whether two single expressions, relations or sets in LaTeX are equal; False where one cannot be read.

    Expressions are compared at points: different values there are a proof, and equal ones to 20 digits at several random points
    are as good as one. What has no values (sets, relations) is compared by math-verify, in both orders.
    """
    left, right = _parsed(answer), _parsed(given)
    if left is None or right is None:
        return False
    found = _same_values(left, right)
    return _verified(left, right) if found is None else found


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """The SymPy object that math-verify's own parser makes, None where it makes none. Upper and lower case are two letters."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.grader import should_treat_as_complex

    config = ConversionConfig(lowercase_symbols=False)
    try:
        found = latex2sympy(text, is_real=not should_treat_as_complex(text), normalization_config=None, conversion_config=config)
        return _with_imaginary_unit(found)
    except (RecursionError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 the parser raises whatever its grammar meets
        return None


def _with_imaginary_unit(expression: Any) -> Any:
    """`expression` with the number i where the parser made a letter of it."""
    from sympy import I

    letters = [symbol for symbol in expression.free_symbols if symbol.name == "i"]
    return expression.subs(dict.fromkeys(letters, I)) if letters else expression


def _verified(left: Any, right: Any) -> bool:
    from math_verify import verify

    # None: no timers of signals in here, the caller keeps the time
    orders = ((left, right), (right, left))
    return any(verify(*pair, timeout_seconds=None, raise_on_error=False, allow_set_relation_comp=True) for pair in orders)


def _same_values(left: Any, right: Any) -> bool | None:
    """Equality at random points; None where these are no expressions, or have no values there."""
    from sympy import Equality, Expr, Float

    if isinstance(left, Equality) and isinstance(right, Equality):
        return _same_zeros(left, right)
    if isinstance(left, Equality) or isinstance(right, Equality):
        return False  # what is no value of a name, like 2x + 3y = 6, is no value
    if not isinstance(left, Expr) or not isinstance(right, Expr) or left.is_infinite or right.is_infinite:
        return None
    tolerance = TOLERANCE if left.has(Float) or right.has(Float) else EXACT
    pairs = _values(left, right)
    if not pairs:
        return None
    if len(pairs) == 1 and tolerance == EXACT and _close(*pairs[0], EXACT):
        return all(map(_is_zero, (left - right).evalf(DIGITS, maxn=MOST_DIGITS).as_real_imag()))
    if all(_close(one, other, tolerance) for one, other in pairs):
        return True
    names = {symbol.name for symbol in left.free_symbols | right.free_symbols}
    return bool(names) and names <= WHOLE and _same_at_whole_numbers(left, right, tolerance)


def _same_at_whole_numbers(left: Any, right: Any, tolerance: float) -> bool:
    """Equality where letters like n are 1, 2, 3...: (-1)^n is cos(n pi) there."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    choose = random.Random(SEED)
    for size in WHOLE_SIZES:
        point = {symbol: float(choose.randint(1, size)) for symbol in symbols}
        one, other = _evaluated(left, point), _evaluated(right, point)
        if one is None or other is None or not _close(one, other, tolerance):
            return False
    return True


def _same_zeros(left: Any, right: Any) -> bool | None:
    """Whether two equations have the same zeros, from the factors of their polynomials; None where math-verify must solve them."""
    from sympy import Poly, PolynomialError, fraction, together

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    try:
        ours, theirs = (
            Poly(fraction(together(each.lhs - each.rhs))[0].doit(), *symbols, extension=True).sqf_part().monic() for each in (left, right)
        )
    except (PolynomialError, TypeError, AttributeError, NotImplementedError, ValueError):
        return None
    if ours == theirs:
        return True
    return None if len(symbols) == 1 else False  # of one symbol: they may have the same real zeros


def _values(left: Any, right: Any) -> list[tuple[complex, complex]]:
    """Values of both at the same points, those where both are real before all others; none where there are too few."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if not symbols:
        both = _evaluated(left, {}), _evaluated(right, {})
        return [] if None in both else [both]  # type: ignore[list-item]
    choose = random.Random(SEED)
    real, other = [], []
    for scale in SCALES * 2:
        point = {symbol: choose.uniform(-scale, scale) for symbol in symbols}
        for signs in (point, {symbol: abs(value) for symbol, value in point.items()}):
            one, two = _evaluated(left, signs), _evaluated(right, signs)
            if one is not None and two is not None:
                (real if one.imag == 0 and two.imag == 0 else other).append((one, two))
    enough = real if len(real) >= ENOUGH else [*real, *other]
    return enough if len(enough) >= ENOUGH else []


def _evaluated(expression: Any, point: dict[Any, float]) -> Any:
    """The value as an mpmath number, None where there is none."""
    import mpmath
    from sympy import Float

    try:
        value = expression.evalf(DIGITS, subs={symbol: Float(repr(number), DIGITS) for symbol, number in point.items()})
        if not value.is_number or not value.is_finite:
            return None
        with mpmath.workdps(DIGITS):
            return mpmath.mpc(*(mpmath.mpf(0) if _is_zero(part) else mpmath.mpf(str(part)) for part in value.as_real_imag()))
    except (RecursionError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 SymPy raises whatever its functions meet
        return None


def _is_zero(number: Any) -> bool:
    """Whether no digit of `number` is known: SymPy's evaluation of what is exactly 0."""
    return bool(number == 0 or getattr(number, "_prec", 2) == 1)


def _close(one: Any, other: Any, tolerance: float) -> bool:
    """Within `tolerance` of the larger, and of 1 where they are larger."""
    import mpmath

    with mpmath.workdps(DIGITS):
        largest = max(abs(one), abs(other))
        if tolerance == EXACT:
            return abs(one - other) <= tolerance * largest
        return abs(one - other) <= tolerance * min(largest, mpmath.mpf(1))
