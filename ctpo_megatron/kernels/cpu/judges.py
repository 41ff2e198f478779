"""The objectives as functions of one token, for `cpu.tokens`: each the scalar form of `algorithms/objectives/NAME.py`.

A judge returns (loss, derivative by logp, fate). It is given `ratio`, of what is judged; `d`, the token's log-ratio, and `own`,
the derivative of that by logp (0 where it was held to +-20); `a`, the advantage; `o`, the objective's options in the order of
`algorithms.fused`, an absent bound as infinity. All floats have the number format of the streams, in which the reference
computes, so there are no literals: `one` is 1. Ties are decided as torch decides them.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

CTPO, GRPO, GSPO, SEQUENCE, SAPO, CISPO, GMPO, MINPRO, DPPO, CPPO, TRM = range(11)
K2, K3, BINARY_TV, BINARY_KL = range(4)
UNTOUCHED, HIGH, LOW, DUAL = 0, 1, 2, 4
"""What became of a token, as bits: `high`, `low` and `dual` of `algorithms.tokens.TokenLoss`."""

options: Any = {"nogil": True, "error_model": "numpy"}


@numba.njit(**options)
def divergence(kind, logp, anchor, d, one, tiny, most):
    """`algorithms.divergence` of one token, over the sampled token and all others; `most` is 1 - `tiny`."""
    half, zero = one / (one + one), one - one
    if kind == K2:
        return half * (d * d)
    if kind == K3:
        return np.expm1(d) - d
    mu, pi = math.exp(anchor), math.exp(logp)
    rest_mu, rest_pi = max(one - mu, zero), max(one - pi, zero)
    if kind == BINARY_TV:
        return half * (abs(mu - pi) + abs(rest_mu - rest_pi))
    mu, pi = min(max(mu, tiny), most), min(max(pi, tiny), most)
    rest_mu, rest_pi = min(max(rest_mu, tiny), most), min(max(rest_pi, tiny), most)
    return mu * (math.log(mu) - math.log(pi)) + rest_mu * (math.log(rest_mu) - math.log(rest_pi))


@numba.njit(**options)
def scale_of(position, power, one):
    """position ** power, by the roots that torch takes."""
    half = one / (one + one)
    if power == half:
        return math.sqrt(position)
    if power == one - one:
        return one
    if power == one:
        return position
    if power == -half:
        return one / math.sqrt(position)
    return position**power


@numba.njit(**options)
def ctpo(held, ratio, position, a, o, one, beyond):
    """`held`: the log-ratio; `beyond`: whether it was more before. `o`: geomean, low, high, dual, power."""
    zero = one - one
    scale = scale_of(position, o[4], one)
    low, high, ceiling = -o[1] * scale, o[2] * scale, o[3] * scale
    if a < zero:
        if held < low:
            return -a * math.exp(low), zero, LOW
        if held > ceiling:
            return -a * math.exp(ceiling), zero, DUAL
    elif held > high:
        return -a * math.exp(high), zero, HIGH if a > zero else UNTOUCHED
    loss = -a * ratio
    return loss, zero if beyond else loss, UNTOUCHED


@numba.njit(**options)
def clipped(ratio, slope, a, low, high, dual, one):
    """PPO's surrogate; `slope` is the derivative of the log-ratio. Returns loss, derivative, fate."""
    zero = one - one
    loss, fate = -a * ratio, UNTOUCHED
    grad = loss * slope
    if a > zero and ratio > high:
        loss, grad, fate = -a * high, zero, HIGH
    elif a < zero:
        if ratio < low:
            loss, grad, fate = -a * low, zero, LOW
        ceiling = -a * dual
        if loss > ceiling:
            loss, grad, fate = ceiling, zero, fate | DUAL
        elif loss == ceiling:  # the smaller of two equals has half the gradient
            grad = grad / (one + one)
    return loss, grad, fate


@numba.njit(**options)
def weighted(ratio, logp, a, low, high, one):
    """The clipped ratio as a weight. Returns loss, derivative, fate."""
    zero, fate = one - one, UNTOUCHED
    if a > zero and ratio > high:
        fate = HIGH
    elif a < zero and ratio < low:
        fate = LOW
    grad = -min(max(ratio, low), high) * a
    return grad * logp, grad, fate


@numba.njit(**options)
def mean_held(d, a, low, high, one):
    """What `gmpo` adds up, and its derivative by the log-ratio."""
    zero = one - one
    if a == zero:
        return zero, zero
    if a > zero:
        return (high, zero) if d > high else (d, one)
    return (low, zero) if d < low else (d, one)


@numba.njit(**options)
def gmpo(ratio, d, own, a, o, one):
    """-A R of a sequence whose geometric mean is `ratio`, with the gradient of the token's own part. `o`: low, high."""
    zero, fate = one - one, UNTOUCHED
    if a > zero and d > o[1]:
        fate = HIGH
    elif a < zero and d < -o[0]:
        fate = LOW
    loss = -a * ratio
    return loss, loss * mean_held(d, a, -o[0], o[1], one)[1] * own, fate


@numba.njit(**options)
def sapo(ratio, own, a, o, one):
    """Loss and derivative. `o`: tau where the advantage is positive, and elsewhere."""
    tau = o[0] if a > one - one else o[1]
    four = one + one + one + one
    gate = one / (one + math.exp(-(tau * (ratio - one))))
    rising = gate * (one - gate) * tau * (four / tau)
    return -a * (gate * (four / tau)), -a * rising * ratio * own


@numba.njit(**options)
def dppo(d, ratio, found, logp, a, o, one):
    """`o`: delta, ratio_cap. `found` is the divergence."""
    zero = one - one
    away = (a > zero and d > zero) or (a < zero and d < zero)
    if away and found > o[0]:
        return zero, zero, dropped(a, zero)
    grad = -a * min(ratio, o[1])
    return grad * logp, grad, UNTOUCHED


@numba.njit(**options)
def within(ratio, own, keep, a, one):
    """-A r of the tokens that are kept."""
    zero = one - one
    if not keep:
        return zero, zero, dropped(a, zero)
    loss = -a * ratio
    return loss, loss * own, UNTOUCHED


@numba.njit(**options)
def dropped(a, zero):
    """The fate of a token that is left out."""
    return HIGH if a > zero else LOW


@numba.njit(**options)
def in_budget(ratio, found, spent, ramp, position, length, a, o, one):
    """Whether `cppo` keeps a token. `o`: delta, budget, weight_min."""
    zero = one - one
    before, slope = position - one, zero
    if length > one:
        slope = (one - o[2]) / max(length - one, one)
    weight = one - slope * before
    weights_before = before - slope * before * (before - one) / (one + one)
    limit = min(o[0] + o[1] * weights_before - (spent - slope * ramp), o[0])
    return a * (ratio - one) <= zero or weight * found <= limit
