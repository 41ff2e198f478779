"""An objective's loss, its derivative and all statistics of packed sequences, in one pass over the tokens.

Every token is read once and two numbers are written, so nothing per token is held besides. Prefix sums are those of
`algorithms.operators`, in fixed point, hence the same bits as the scan's; the rest differs from the reference by rounding alone.
What is not finite at a token that the policy wrote is reported by its place, and makes that token's loss NaN.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from ctpo_megatron.kernels import numbers
from ctpo_megatron.kernels.compiled import compiled
from ctpo_megatron.kernels.cpu import buckets
from ctpo_megatron.kernels.cpu import judges as j
from ctpo_megatron.kernels.cpu.buckets import bucket_of
from ctpo_megatron.kernels.numbers import BUCKETS, DECILES, FRACTION_BITS, POSITION_BINS

# rows of `sums`, one number each; then five vectors over positions, and two over tenths
RATIO, RATIO_SQ, KL_OLD, LOG_RATIO_SQ, RATIO_MAX, RATIO_MIN = range(6)
WEIGHT, WEIGHT_SQ, WEIGHT_BEFORE, WEIGHT_LOG, WEIGHT_MAX, WEIGHT_BEFORE_MAX = range(6, 12)
BY_POSITION = 12
BY_TENTH = BY_POSITION + 5 * POSITION_BINS
SUMS = BY_TENTH + 2 * DECILES
# rows of `counts`: then two distributions of log-ratios
TOKENS, CLIP_HIGH, CLIP_LOW, CLIP_DUAL, CLIPPED, WEIGHT_ZERO, BAD, BAD_PLACE = range(8)
BY_BUCKET = 8
DENSITY = 3 * POSITION_BINS * BUCKETS
COUNTS = BY_BUCKET + 2 * DENSITY
LARGEST = (RATIO_MAX, WEIGHT_MAX, WEIGHT_BEFORE_MAX)  # rows that are no sums, besides RATIO_MIN

LEVEL_NONE, LEVEL_TOKEN, LEVEL_PREFIX, LEVEL_SEQUENCE, LEVEL_GEOMETRIC = range(5)
TRUNCATE, MASK = range(2)

SOURCES = (__file__, *(str(module.__file__) for module in (j, buckets, numbers)))
_UNIT = 2.0**FRACTION_BITS
_MIDDLE = (BUCKETS - 1) // 2
_LOOK_AHEAD = (j.GSPO, j.SEQUENCE, j.GMPO, j.TRM)  # which look at the whole sequence first


@numba.njit(**j.options)
def _fixed(x):
    return np.int64(np.rint(np.float64(x) * _UNIT))


@numba.njit(**j.options)
def _apart(x, y, one, most):
    """(x - y held to +-most, its derivative by x); 0 for what is not finite."""
    raw = x - y
    if not math.isfinite(raw):
        return one - one, one - one
    if abs(raw) > most:
        return math.copysign(most, raw), one - one
    return raw, one


@numba.njit(**j.options)
def _whole(kind, o, measure, level, begin, end, streams, mask, consts):
    """What a sequence's tokens have in common: (their number, total, largest, sum of signs, total mismatch)."""
    logp, anchor, old, rollout, advantages = streams
    one, most, _, tiny, nearly = consts[0], consts[1], consts[2], consts[3], consts[4]
    zero = one - one
    count, total, wide, largest, signs, mismatch = 0, 0, 0.0, -np.inf, 0, 0
    for t in range(begin, end):
        count += mask[t]
    if kind not in _LOOK_AHEAD and level < LEVEL_SEQUENCE:
        for t in range(begin, end):
            if mask[t]:
                signs += (advantages[t] > zero) - (advantages[t] < zero)
        return count, wide, largest, signs, wide
    for t in range(begin, end):
        if not mask[t]:
            continue
        signs += (advantages[t] > zero) - (advantages[t] < zero)
        d, _own = _apart(logp[t], anchor[t], one, most)
        if kind == j.TRM:
            found = j.divergence(measure, logp[t], anchor[t], d, one, tiny, nearly)
            largest = max(largest, np.float64(found))
            if measure in (j.K2, j.K3):
                wide += np.float64(found)
            else:
                total += _fixed(min(found, most))
        elif kind == j.GMPO:
            total += _fixed(j.mean_held(d, advantages[t], -o[0], o[1], one)[0])
        else:
            total += _fixed(d)
        if level >= LEVEL_SEQUENCE:
            mismatch += _fixed(_apart(old[t], rollout[t], one, most)[0])
    return count, wide + total / _UNIT, largest, signs, mismatch / _UNIT


@numba.njit(**j.options)
def _judged(kind, measure, o, consts, token, before, shared, keep, length):
    """Loss, derivative, judged log-ratio, fate and ratio of a token, and its divergence where the objective needs it later.

    `token`: logp, anchor, advantage, log-ratio, that one's derivative, prefix sum and position; `before`: the smallest log-ratio,
    the divergence and its weighted sum over the tokens before.
    """
    logp, anchor, a, d, own, prefix, n = token
    one, top, tiny, nearly = consts[0], consts[2], consts[3], consts[4]
    zero = one - one
    found, fate, held, beyond = zero, j.UNTOUCHED, d, False
    if kind in (j.GSPO, j.SEQUENCE):
        held = min(shared, top)
    elif kind == j.GMPO:
        held = shared
    elif kind == j.CTPO:
        raw = prefix / n if o[0] != zero else prefix
        held, beyond = min(raw, top), raw > top
    elif kind == j.MINPRO and not math.isinf(before[0]):
        held = before[0] + d
    ratio = math.exp(held)
    if kind == j.CTPO:
        loss, grad, fate = j.ctpo(held, ratio, n, a, o, one, beyond)
    elif kind == j.GRPO:
        loss, grad, fate = j.clipped(ratio, own, a, o[0], o[1], o[2], one)
    elif kind in (j.GSPO, j.SEQUENCE):
        loss, grad, fate = j.clipped(ratio, zero if shared > top else one, a, o[0], o[1], o[2], one)
    elif kind == j.SAPO:
        loss, grad = j.sapo(ratio, own, a, o, one)
    elif kind == j.CISPO:
        loss, grad, fate = j.weighted(ratio, logp, a, o[0], o[1], one)
    elif kind == j.GMPO:
        loss, grad, fate = j.gmpo(ratio, d, own, a, o, one)
    elif kind == j.MINPRO:
        if o[3] != zero:
            loss, grad, fate = j.clipped(ratio, own, a, o[0], o[1], o[2], one)
        else:
            loss, grad, fate = j.weighted(ratio, logp, a, o[0], o[1], one)
    elif kind == j.DPPO:
        found = j.divergence(measure, logp, anchor, d, one, tiny, nearly)
        loss, grad, fate = j.dppo(d, ratio, found, logp, a, o, one)
    elif kind == j.CPPO:
        found = j.divergence(measure, logp, anchor, d, one, tiny, nearly)
        kept = j.in_budget(ratio, found, before[1], before[2], n, length, a, o, one)
        loss, grad, fate = j.within(ratio, own, kept, a, one)
    else:
        loss, grad, fate = j.within(ratio, own, keep, a, one)
    return loss, grad, held, fate, ratio, found


@numba.njit(**j.options)
def _correct(level, manner, consts, e, prefix, total, length, sums, counts):
    """The correction's factor of a token whose mismatch is `e`; notes what became of its weight."""
    one, most, lowest, highest = consts[0], consts[1], consts[5], consts[6]
    logs = e
    if level == LEVEL_PREFIX:
        logs = prefix
    elif level == LEVEL_SEQUENCE:
        logs = total
    elif level == LEVEL_GEOMETRIC:
        logs = total / length
    logs = min(max(logs, -most), most)
    weight = math.exp(logs)
    factor = min(max(weight, lowest), highest)
    if manner == MASK and factor != weight:
        factor = one - one
    sums[WEIGHT] += factor
    sums[WEIGHT_SQ] += factor * factor
    sums[WEIGHT_BEFORE] += weight
    sums[WEIGHT_LOG] += logs
    sums[WEIGHT_MAX] = max(sums[WEIGHT_MAX], np.float64(factor))
    sums[WEIGHT_BEFORE_MAX] = max(sums[WEIGHT_BEFORE_MAX], np.float64(weight))
    counts[WEIGHT_ZERO] += factor == one - one
    return factor


@numba.njit(**j.options)
def _note(sums, counts, d, held, fate, ratio):
    """What `algorithms.statistics` counts of a token."""
    counts[TOKENS] += 1
    counts[CLIP_HIGH] += fate & j.HIGH != 0
    counts[CLIP_LOW] += fate & j.LOW != 0
    counts[CLIP_DUAL] += fate & j.DUAL != 0
    counts[CLIPPED] += fate != j.UNTOUCHED
    sums[RATIO] += ratio
    sums[RATIO_SQ] += ratio * ratio
    sums[KL_OLD] -= d
    sums[LOG_RATIO_SQ] += held * held
    sums[RATIO_MAX] = max(sums[RATIO_MAX], np.float64(ratio))
    sums[RATIO_MIN] = min(sums[RATIO_MIN], np.float64(ratio))


@numba.njit(**j.options)
def _note_place(sums, counts, at, prefix, n, tenth, fate, a, density, lookup):
    """What `algorithms.health` and, where it is asked for, `algorithms.density` count of a token."""
    sums[BY_TENTH + (DECILES if fate != j.UNTOUCHED else 0) + tenth] += 1.0
    wide = np.float64(prefix)
    if density:
        row = BY_BUCKET + _MIDDLE + ((np.int64(a > 0) - np.int64(a < 0) + 1) * POSITION_BINS + at) * BUCKETS
        counts[row + bucket_of(wide, 0, lookup)] += 1
        grown = wide / math.sqrt(np.float64(n))
        counts[row + DENSITY + bucket_of(grown, 1, lookup)] += 1
    by = BY_POSITION + at
    sums[by] += 1.0
    sums[by + POSITION_BINS] += n
    sums[by + 2 * POSITION_BINS] += wide
    sums[by + 3 * POSITION_BINS] += wide * wide
    sums[by + 4 * POSITION_BINS] += fate != j.UNTOUCHED


@numba.njit(**j.options)
def _sequence(how, consts, sequence, begin, end, streams, mask, restarts, lookup, whole, out, sums, counts):
    """One sequence from `begin` to `end`; `whole` is what `_whole` found of it."""
    kind, o, measure, level, manner, density = how
    logp, anchor, old, rollout, advantages = streams
    value, slope, seen, fates = out
    total, keep, gaps, length = whole
    one, most, tenths = consts[0], consts[1], consts[7]
    zero, none = one - one, consts[8]
    prefix, gap_prefix, place, position, spent, ramp, smallest = 0, 0, 0, 0, 0, 0.0, none
    at, border = 0, 2
    for t in range(begin, end):
        if len(restarts) and restarts[t]:
            prefix, gap_prefix, position, spent, ramp, smallest, at, border = 0, 0, 0, 0, 0.0, none, 0, 2
        if not mask[t]:
            value[t] = slope[t] = zero
            continue
        d, own = _apart(logp[t], anchor[t], one, most)
        prefix += _fixed(d)
        place += 1
        position += 1
        if position >= border and at < POSITION_BINS - 1:
            at, border = at + 1, border * 2
        log_sum, n, a = consts.dtype.type(prefix / _UNIT), consts.dtype.type(position), advantages[t]
        before = (smallest, consts.dtype.type(spent / _UNIT), consts.dtype.type(ramp))
        token = (logp[t], anchor[t], a, d, own, log_sum, n)
        loss, grad, held, fate, ratio, found = _judged(kind, measure, o, consts, token, before, total, keep, length)
        smallest = min(smallest, d)
        if kind == j.CPPO:
            ramp += (position - 1) * np.float64(found)
            spent += _fixed(min(found, most))
        _note(sums, counts, d, held, fate, ratio)
        tenth = min(np.int64(consts.dtype.type(place - 1) * tenths / length), DECILES - 1)
        _note_place(sums, counts, at, log_sum, n, tenth, fate, a, density, lookup)
        if level != LEVEL_NONE:
            e, _own = _apart(old[t], rollout[t], one, most)
            gap_prefix += _fixed(e)
            factor = _correct(level, manner, consts, e, consts.dtype.type(gap_prefix / _UNIT), gaps, length, sums, counts)
            loss, grad = loss * factor, grad * factor
        if not math.isfinite(logp[t] + old[t] + rollout[t]):
            loss, grad = np.nan * loss, np.nan * grad
            if counts[BAD] < 0:
                counts[BAD], counts[BAD_PLACE] = sequence, place
        value[t], slope[t] = loss, grad
        if len(seen):
            seen[t], fates[t] = held, fate


@compiled(None, SOURCES, **j.options)
def judge(how, consts, bounds, first, last, streams, mask, restarts, lookup, out, lengths, signs, sums, counts):
    """Sequences `first` to `last` - 1 of those with borders `bounds`; writes `out`, `lengths`, `signs`, `sums` and `counts`.

    `how`: the objective, its options, its divergence, the correction's level and manner, and whether log-ratios are put into
    buckets. `consts`: 1, 20, 10, 1e-8, 1 - 1e-8, the
    correction's bounds, 10 and infinity. `streams`: logp, anchor, old_logp, rollout_logp, advantages, each [T], of one number
    format with the options, `consts` and the first two of `out`: loss and derivative [T]. The other two, judged log-ratio and
    fate, are [T] or empty, like `restarts`. `lengths` and `signs` are [N] float64, `sums` [SUMS], `counts` [COUNTS].
    """
    kind, o, measure, level = how[0], how[1], how[2], how[3]
    sums[RATIO_MAX] = sums[WEIGHT_MAX] = sums[WEIGHT_BEFORE_MAX] = -np.inf
    sums[RATIO_MIN] = np.inf
    counts[BAD] = -1
    for sequence in range(first, last):
        begin, end = bounds[sequence], bounds[sequence + 1]
        many, total, largest, sign, gaps = _whole(kind, o, measure, level, begin, end, streams, mask, consts)
        lengths[sequence], signs[sequence] = many, sign
        length = consts.dtype.type(max(many, 1))
        shared, keep = consts.dtype.type(total), True
        if kind == j.TRM:
            keep = (math.isinf(o[0]) or consts.dtype.type(largest) <= o[0]) and (math.isinf(o[1]) or shared / length <= o[1])
        elif kind in (j.GSPO, j.GMPO):
            shared = shared / length
        whole = (shared, keep, consts.dtype.type(gaps), length)
        _sequence(how, consts, sequence, begin, end, streams, mask, restarts, lookup, whole, out, sums, counts)
