"""Made runs, healthy and with a known fault: rows of metrics as a run would record them.

Nothing here was measured of a run that ended badly. What is taken from recorded healthy runs (40 and 14 steps of 512 attempts
each, of a tiny model) is the noise from step to step, as `record.alarms.series.jitter` has it: reward 6 % of itself, entropy
0.4 %, length 2.5 %, drift 5 % (12 % by position), clip fractions 50 to 100 %, seconds 13 to 38 %; and steps on which everything
jumps for once, as one in forty did (effective sample size 0.998 to 0.46, entropy up by 30 %). Noise is made heavier than that:
Student's t with 4 degrees of freedom, half of it carried over from the step before.

A fault begins at a step between 150 and 250 and grows, at a pace drawn between 0.7 and 1.5 of what is written at it. Harm is
written beside each fault, as a number of the run without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GROUPS, ANSWERS = 32, 256  # of a step
POSITIONS = [1, 4, 16, 64, 256, 1024]
LAYERS = 4
HELD_OUT, EVERY = 512, 10  # prompts of an evaluation, and the steps between two


@dataclass
class Truth:
    """A run without noise: [steps] each. Faults change it."""

    quality: Array  # the share of answers that are right
    reward: Array
    entropy: Array
    length: Array
    broken_off: Array
    mixed: Array
    undecided: Array  # share of the answers
    drift: Array
    sample_size: Array
    clip: Array  # [steps, deciles]
    log_weight: Array
    load: Array  # [steps, layers]
    staleness: Array
    aborted: Array  # groups a step
    rollout_s: Array
    tail: Array  # share of the rollout
    other_s: Array
    memory: Array
    apart: Array  # accuracy on held-out prompts less that of the answers


@dataclass(frozen=True)
class Fault:
    """A fault: changes a run from step `begin` on, at a `pace`; `harm` says from which step on there is harm (first index)."""

    alarm: str
    story: str
    harm_words: str
    change: Callable[[Truth, int, float], None]
    harm: Callable[[Truth, int], int | None]
    steps: int = 600


@dataclass
class Made:
    """A run as it would be recorded, and what is known of it. `harm`: the step of it, None where there is none."""

    rows: list[dict[str, float]]
    begin: int | None = None
    harm: int | None = None
    truth: Truth | None = field(default=None, repr=False)


def healthy(seed: int, steps: int = 600) -> Made:
    """Returns a run that learns, some until the task is solved."""
    rng = np.random.default_rng(seed)
    truth = _truth(rng, steps)
    return Made(_rows(truth, rng), truth=truth)


def faulty(fault: Fault, seed: int) -> Made:
    """Returns a run with `fault` in it."""
    rng = np.random.default_rng([seed, *fault.alarm.encode()])
    truth = _truth(rng, fault.steps, solves=False)
    begin, pace = int(rng.integers(150, 250)), float(rng.uniform(0.7, 1.5))
    fault.change(truth, begin, pace)
    harm = fault.harm(truth, begin)
    return Made(_rows(truth, rng), begin + 1, None if harm is None else harm + 1, truth)


def _truth(rng: np.random.Generator, steps: int, *, solves: bool | None = None) -> Truth:
    """Returns a healthy run: answers get better, entropy falls and responses grow with that, all else stays as it is."""
    first, last = (
        rng.uniform(0.05, 0.3),
        rng.uniform(0.92, 0.98) if solves is None and rng.random() < 0.5 else rng.uniform(0.6, 0.8),
    )
    middle, width = rng.uniform(0.3, 0.6) * steps, rng.uniform(0.12, 0.25) * steps
    learnt = 1 / (1 + np.exp(-(np.arange(steps) - middle) / width))
    # the end of the curve rises on: a run that has come to rest is not the healthy one
    quality = np.clip(first + (last - first) * (0.75 * learnt + 0.25 * np.arange(steps) / steps), 0.0, 1.0)
    ones = np.ones(steps)
    seconds = rng.uniform(20, 200)
    return Truth(
        quality=quality,
        reward=quality.copy(),
        entropy=rng.uniform(0.4, 1.2) * np.exp(-rng.uniform(0.3, 1.2) * (quality - first)),
        length=rng.uniform(200, 3000) * (1 + rng.uniform(-0.3, 1.5) * (quality - first)),
        broken_off=rng.uniform(0.01, 0.08) * ones,
        mixed=0.95 * np.sqrt(4 * quality * (1 - quality)) ** 0.7,
        undecided=rng.uniform(0.0, 0.005) * ones,
        drift=rng.uniform(0.004, 0.015) * (1 + 0.1 * np.arange(steps) / 1000),
        sample_size=rng.uniform(0.85, 0.995) * ones,
        clip=rng.uniform(0.03, 0.12) * np.ones((steps, 10)),
        log_weight=-rng.uniform(0.01, 0.1) * ones,
        load=rng.uniform(1.2, 2.2, LAYERS) * np.ones((steps, LAYERS)),
        staleness=rng.uniform(0.5, 1.5) * ones,
        aborted=0.05 * ones,
        rollout_s=seconds * ones,
        tail=rng.uniform(0.1, 0.3) * ones,
        other_s=rng.uniform(0.05, 0.15) * seconds * ones,
        memory=rng.uniform(0.2, 0.6) * ones,
        apart=0.0 * ones,
    )


def _rows(truth: Truth, rng: np.random.Generator) -> list[dict[str, float]]:
    steps = len(truth.quality)
    jump = rng.random(steps) < 0.025  # steps on which everything jumps, for once

    def noisy(values: Array, relative: float) -> Array:
        wild = rng.standard_t(4, values.shape)
        wild[1:] = 0.5 * wild[:-1] + 0.75**0.5 * wild[1:]
        return np.asarray(values * np.exp(np.clip(relative * wild, -2, 2)))

    columns = {
        "reward/mean": _around(truth.reward, 0.06, rng),
        "reward/term/answer": _around(truth.quality, 0.06, rng),
        "reward/mixed_groups": np.clip(truth.mixed + 0.05 * rng.standard_normal(steps), 0, 1),
        "reward/undecided": rng.binomial(ANSWERS, truth.undecided).astype(float),
        "train/entropy": noisy(truth.entropy, 0.01) * np.where(jump, 1.3, 1.0),
        "rollout/response_tokens": noisy(truth.length, 0.025),
        "rollout/truncated": rng.binomial(ANSWERS, truth.broken_off) / ANSWERS,
        "rollout/unanswered": np.zeros(steps),
        "tool/error_rate": rng.binomial(ANSWERS, 0.06, steps) / ANSWERS,
        "drift/mean": noisy(truth.drift, 0.05) * np.where(jump, 1.5, 1.0),
        "health/effective_sample_size": np.where(jump, 0.4, 1.0) * np.clip(noisy(truth.sample_size, 0.02), 0, 1),
        "train/correction_log": noisy(truth.log_weight, 0.2),
        "rollout/staleness_mean": noisy(truth.staleness, 0.1),
        "ledger/aborted": rng.poisson(truth.aborted).astype(float),
        "time/rollout": noisy(truth.rollout_s, 0.2),
        "time/train": noisy(0.5 * truth.rollout_s, 0.2),
        "host/memory_used": np.clip(truth.memory + 0.01 * rng.standard_t(4, steps), 0, 1),
    }
    columns["time/batch"] = 0.01 * columns["time/rollout"]
    columns["time/rollout_tail"] = np.minimum(noisy(truth.tail * truth.rollout_s, 0.3), columns["time/rollout"])
    columns["time/step"] = columns["time/rollout"] + columns["time/train"] + columns["time/batch"]
    for k, position in enumerate(POSITIONS):
        columns[f"drift/from_token_{position}"] = noisy(truth.drift * (1 + 0.05 * k), 0.12)
    for k in range(10):
        columns[f"health/clip_fraction/decile_{k}"] = np.clip(noisy(truth.clip[:, k], 0.7), 0, 1)
    for k in range(LAYERS):
        columns[f"moe/load_max_over_mean/layer_{k}"] = 1 + noisy(truth.load[:, k] - 1, 0.1)
    time = 1.7e9 + np.cumsum(columns["time/step"] + noisy(truth.other_s, 0.3))
    names = ["step", "time", *columns]
    table = np.stack([np.arange(1, steps + 1), time, *columns.values()], axis=1)
    rows = [dict(zip(names, row, strict=True)) for row in table.tolist()]
    right = rng.binomial(HELD_OUT, np.clip(truth.quality + truth.apart, 0, 1)) / HELD_OUT
    for row, accuracy in zip(rows[EVERY - 1 :: EVERY], right[EVERY - 1 :: EVERY].tolist(), strict=True):
        row["eval/accuracy"] = accuracy
    return rows


def _around(share: Array, relative: float, rng: np.random.Generator) -> Array:
    """A mean of answers: its noise is that of the answers, and of the prompts that a step happened to draw."""
    share = np.clip(share, 0, 1)
    spread = np.maximum(relative * np.sqrt(share * (1 - share)) / 0.5, (share * (1 - share) / ANSWERS) ** 0.5)
    return np.asarray(np.clip(share + 0.5 * spread * rng.standard_t(4, len(share)), 0, 1))


# what goes wrong, and from when on that is harm


def since(truth: Truth, begin: int, pace: float) -> Array:
    """Returns how far the fault has come: steps since its beginning, times its pace; 0 before."""
    return np.asarray(pace * np.maximum(np.arange(len(truth.quality)) - begin, 0))


def _first(condition: NDArray[np.bool_], begin: int) -> int | None:
    found = np.flatnonzero(condition[begin:])
    return begin + int(found[0]) if found.size else None


def _five_points(truth: Truth, begin: int) -> int | None:
    return _first(truth.quality < np.maximum.accumulate(truth.quality) - 0.05, begin)


def _hold(truth: Truth, begin: int) -> None:
    """Answers get no better from here on."""
    for values in (truth.quality, truth.reward, truth.mixed, truth.entropy, truth.length):
        values[begin:] = values[begin]


def _entropy(truth: Truth, begin: int, pace: float) -> None:
    _hold(truth, begin)
    far = since(truth, begin, pace)
    truth.entropy *= np.exp(-far / 40)
    truth.mixed *= np.exp(-far / 60)
    truth.quality -= 0.001 * np.maximum(far - 60, 0)
    truth.reward[:] = truth.quality


def _length(truth: Truth, begin: int, pace: float) -> None:
    _hold(truth, begin)
    far = since(truth, begin, pace)
    truth.length *= np.exp(0.008 * far)
    truth.quality -= 0.0006 * np.maximum(far - 40, 0)
    truth.reward += 0.001 * far  # paid for length


def _format(truth: Truth, begin: int, pace: float) -> None:
    _hold(truth, begin)
    far = since(truth, begin, pace)
    truth.broken_off[:] = np.minimum(truth.broken_off + 0.004 * far, 0.9)
    truth.quality -= 0.0006 * np.maximum(far - 40, 0)
    truth.reward[:] = truth.quality


def _accuracy(truth: Truth, begin: int, pace: float) -> None:
    _hold(truth, begin)
    truth.apart -= 0.0005 * since(truth, begin, pace)


def _clip(truth: Truth, begin: int, pace: float) -> None:
    truth.clip[:, 7:] = np.minimum(truth.clip[:, 7:] + 0.004 * since(truth, begin, pace)[:, None], 1.0)


def _drift(truth: Truth, begin: int, pace: float) -> None:
    truth.drift *= np.exp(0.01 * since(truth, begin, pace))


def _sample_size(truth: Truth, begin: int, pace: float) -> None:
    truth.sample_size *= np.exp(-since(truth, begin, pace) / 60)


def _mismatch(truth: Truth, begin: int, pace: float) -> None:
    truth.log_weight -= 0.006 * since(truth, begin, pace)


def _stale(truth: Truth, begin: int, pace: float) -> None:
    truth.staleness += 0.04 * since(truth, begin, pace)
    truth.aborted += 3 * np.maximum(truth.staleness - 4, 0)


def _experts(truth: Truth, begin: int, pace: float) -> None:
    truth.load[:, 2] = 1 + (truth.load[:, 2] - 1) * np.exp(0.015 * since(truth, begin, pace))


def _servers(truth: Truth, begin: int, pace: float) -> None:
    slow = since(truth, begin, pace) > 0
    wait = 2.0 * pace * truth.tail * truth.rollout_s + 0.3 * truth.rollout_s
    truth.rollout_s[slow] += wait[slow]
    truth.tail[slow] = 0.6


def _memory(truth: Truth, begin: int, pace: float) -> None:
    truth.memory += 0.002 * since(truth, begin, pace)


def _equal_groups(truth: Truth, begin: int, pace: float) -> None:
    _hold(truth, begin)
    truth.mixed *= np.exp(-since(truth, begin, pace) / 50)


def _undecided(truth: Truth, begin: int, pace: float) -> None:
    truth.undecided += 0.0006 * since(truth, begin, pace)
    truth.undecided[:] = np.minimum(truth.undecided, 0.9)


def _goodput(truth: Truth, begin: int, pace: float) -> None:
    truth.other_s += 0.02 * truth.rollout_s * since(truth, begin, pace)


def _slow_steps(truth: Truth, begin: int) -> int:
    """Until steps have cost a working day more than they would have: 60 steps' worth of rollouts."""
    lost = np.cumsum(truth.rollout_s[begin:] - truth.rollout_s[0])
    return begin + int(np.argmax(lost > 40 * truth.rollout_s[0]))


def _wasted(truth: Truth, begin: int) -> int | None:
    """Until as much time was lost as 60 steps take."""
    lost = np.cumsum(truth.other_s[begin:])
    return _first(np.concatenate([np.zeros(begin, bool), lost > 60 * 1.5 * truth.rollout_s[0]]), begin)


FIVE = "accuracy is 5 points below its best"
FAULTS = [
    Fault("entropy", "entropy falls by 1/e in 40 steps, answers stand still and then get worse", FIVE, _entropy, _five_points),
    Fault(
        "plateau",
        "answers get no better",
        "350 steps without a better answer",
        lambda truth, begin, _pace: _hold(truth, begin),
        lambda _truth, begin: begin + 350,
        steps=800,
    ),
    Fault("length", "responses grow by 0.8 % a step and the reward pays for it", FIVE, _length, _five_points),
    Fault("format", "0.4 % more of the responses break off at each step", FIVE, _format, _five_points),
    Fault(
        "accuracy",
        "held-out prompts are answered 0.05 % worse at each step, and the reward stays",
        "15 points are lost",
        _accuracy,
        lambda truth, begin: _first(truth.apart < -0.15, begin),
        steps=800,
    ),
    Fault(
        "clip",
        "the ends of trajectories are clipped 0.4 % more at each step",
        "9 of 10 of their tokens are clipped",
        _clip,
        lambda truth, begin: _first(truth.clip[:, 9] > 0.9, begin),
    ),
    Fault(
        "drift",
        "trainer and engine part by 1 % a step",
        "0.05 nats, where `drift.mean` ends a run in bfloat16",
        _drift,
        lambda truth, begin: _first(truth.drift > 0.05, begin),
    ),
    Fault(
        "sample_size",
        "effective sample size falls by 1/e in 60 steps",
        "a tenth of the tokens is left",
        _sample_size,
        lambda truth, begin: _first(truth.sample_size < 0.1, begin),
    ),
    Fault(
        "mismatch",
        "the mean log-weight falls by 0.006 a step",
        "a tenth of the batch is left, exp(2 m)",
        _mismatch,
        lambda truth, begin: _first(np.exp(2 * truth.log_weight) < 0.1, begin),
    ),
    Fault(
        "stale",
        "tokens get 0.04 versions older at each step",
        "a quarter of a step's groups is too old",
        _stale,
        lambda truth, begin: _first(truth.aborted > GROUPS / 4, begin),
    ),
    Fault(
        "experts",
        "a layer's load leans 1.5 % more at each step",
        "the busiest expert has 8 times the mean",
        _experts,
        lambda truth, begin: _first(truth.load.max(1) > 8, begin),
    ),
    Fault("servers", "a server is slow from one step on", "40 steps' rollouts of time are lost", _servers, _slow_steps),
    Fault(
        "memory",
        "0.2 % of the host's memory more at each step",
        "98 % of the memory is in use",
        _memory,
        lambda truth, begin: _first(truth.memory > 0.98, begin),
        steps=900,
    ),
    Fault(
        "equal_groups",
        "groups with different rewards become fewer, by 1/e in 50 steps",
        "a tenth of the groups is left",
        _equal_groups,
        lambda truth, begin: _first(truth.mixed < 0.1, begin),
    ),
    Fault(
        "undecided",
        "0.06 % more of the answers have no verdict at each step",
        "a tenth of them, where `rollout.undecided_share` ends a run",
        _undecided,
        lambda truth, begin: _first(truth.undecided > 0.1, begin),
    ),
    Fault("goodput", "each step loses 2 % of a rollout's time more", "60 steps' worth of time is lost", _goodput, _wasted),
]
