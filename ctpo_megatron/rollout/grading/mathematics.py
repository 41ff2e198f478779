"""Whether two LaTeX expressions are equal, by SymPy's numbers and by math-verify.

Evaluating may hang or take all memory (think of 9^9^9^9): only `rollout.judge` calls this, in a process with limits.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

DIGITS = 60  # of every evaluation
TOLERANCE = 1e-6  # where a number was written as a decimal fraction
EXACT = 1e-45  # where none was: what 60 digits leave of rounding
SEED = 2605_07331
# sizes and signs of the points: expressions that agree near 0 only, or for positive numbers only, are told apart
POINTS = ((1.0, True), (3.0, False), (10.0, True), (3.0, False), (1000.0, False), (10.0, False), (1.0, True), (1000.0, True))
MOST_DIGITS = 1000  # to which two exact numbers that look equal are told apart
WHOLE = frozenset("nkm")  # letters of whole numbers
WHOLE_SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 20, 50)
ENOUGH = 3  # points at which both have values


def same_expression(answer: str, given: str) -> bool:
    """Whether two single expressions, relations or sets in LaTeX are equal; False where one cannot be read.

    Expressions are compared at points: different values there are a proof, and equal ones to 45 digits at several random points
    are as good as one. What has no values (sets, relations) is compared by math-verify, in both orders.
    """
    left, right = _parsed(answer), _parsed(given)
    if left is None or right is None:
        return False
    try:
        found = _same_values(left, right)
    except (RecursionError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 SymPy raises whatever its algebra meets
        found = None
    return _verified(left, right) if found is None else found


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """The SymPy object that math-verify's own parser makes, None where it makes none. Upper and lower case are two letters."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.grader import should_treat_as_complex

    config = ConversionConfig(lowercase_symbols=False)
    try:
        found = latex2sympy(text, is_real=not should_treat_as_complex(text), normalization_config=None, conversion_config=config)
        return _with_real_roots(_with_imaginary_unit(found))
    except (RecursionError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 the parser raises whatever its grammar meets
        return None


def _with_imaginary_unit(expression: Any) -> Any:
    """`expression` with the number i where the parser made a letter of it."""
    from sympy import I

    letters = [symbol for symbol in expression.free_symbols if symbol.name == "i"]
    return expression.subs(dict.fromkeys(letters, I)) if letters else expression


def _with_real_roots(expression: Any) -> Any:
    """`expression` with the real roots of odd degree of negative numbers, where SymPy takes complex ones: that of -8 is -2."""
    from sympy import Basic, Integer

    def is_odd_root(part: Any) -> bool:
        return bool(part.is_Pow and part.base.is_negative and part.exp.is_Rational and part.exp.q > 1 and part.exp.q % 2)

    def real(part: Any) -> Any:
        return Integer(-1) ** part.exp.p * (-part.base) ** part.exp

    return expression.replace(is_odd_root, real) if isinstance(expression, Basic) else expression


def _verified(left: Any, right: Any) -> bool:
    from math_verify import verify

    # None: no timers of signals in here, the caller keeps the time
    orders = ((left, right), (right, left))
    return any(verify(*pair, timeout_seconds=None, raise_on_error=False, allow_set_relation_comp=True) for pair in orders)


def _same_values(left: Any, right: Any) -> bool | None:
    """Equality at random points; None where these are no expressions, or have no values there."""
    from sympy import Equality, Expr, Float, Product, Sum

    left, right = (
        each.doit() if each.has(Sum, Product) else each for each in (left, right)
    )  # with a letter as its end, none ends
    if isinstance(left, Equality) and isinstance(right, Equality):
        return _same_zeros(left, right)
    if isinstance(left, Equality) or isinstance(right, Equality):
        return False  # what is no value of a name, like 2x + 3y = 6, is no value
    if not isinstance(left, Expr) or not isinstance(right, Expr) or left.is_infinite or right.is_infinite:
        return None
    tolerance = TOLERANCE if left.has(Float) or right.has(Float) else EXACT
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if not symbols:
        return _same_constants(left, right, tolerance)
    found = _same_at_points(left, right, symbols, tolerance)
    if found is False and all(symbol.name in WHOLE for symbol in symbols):
        return _same_at_whole_numbers(left, right, symbols, tolerance)
    return found


def _same_constants(left: Any, right: Any, tolerance: float) -> bool | None:
    one, other = _evaluated(left, {}), _evaluated(right, {})
    if one is None or other is None:
        return None
    if tolerance != EXACT or not _close(one, other, EXACT):
        return _close(one, other, tolerance)
    return all(map(_is_zero, (left - right).doit().evalf(DIGITS, maxn=MOST_DIGITS).as_real_imag()))


def _same_at_points(left: Any, right: Any, symbols: list[Any], tolerance: float) -> bool | None:
    """Equality where both have real values, or where both have values if those are few; None where they have none."""
    choose = random.Random(SEED)
    real, other = 0, []
    for scale, positive in POINTS:
        point = {symbol: choose.uniform(0.0 if positive else -scale, scale) for symbol in symbols}
        one, two = _evaluated(left, point), _evaluated(right, point)
        if one is None or two is None:
            continue
        if one.imag != 0 or two.imag != 0:
            other.append(_close(one, two, tolerance))
        elif _close(one, two, tolerance):
            real += 1
        else:
            return False
    if real >= ENOUGH:
        return True
    return all(other) if real + len(other) >= ENOUGH else None


def _same_at_whole_numbers(left: Any, right: Any, symbols: list[Any], tolerance: float) -> bool:
    """Equality where letters like n are 1, 2, 3...: (-1)^n is cos(n pi) there."""
    choose = random.Random(SEED)
    for size in WHOLE_SIZES:
        point = {symbol: float(choose.randint(1, size)) for symbol in symbols}
        one, other = _evaluated(left, point), _evaluated(right, point)
        if one is None or other is None or not _close(one, other, tolerance):
            return False
    return True


def _same_zeros(left: Any, right: Any) -> bool | None:
    """Whether two equations have the same zeros, by the factors of their polynomials; None where math-verify must solve them."""
    from sympy import Poly, PolynomialError, fraction, together

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    try:
        ours, theirs = (
            Poly(fraction(together(each.lhs - each.rhs))[0].doit(), *symbols, extension=True).sqf_part().monic()
            for each in (left, right)
        )
    except (PolynomialError, TypeError, AttributeError, NotImplementedError, ValueError):
        return None
    if ours == theirs:
        return True
    if len(symbols) > 1:
        return False
    try:
        return None if ours.count_roots() and theirs.count_roots() else False  # they may have the same real zeros
    except (PolynomialError, NotImplementedError):
        return None


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
