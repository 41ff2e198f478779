"""Every alarm there is: its settings, and the detector that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from ctpo_megatron.config.alarms import Alarm, AlarmsConfig, BoundAlarm
from ctpo_megatron.errors import ConfigError, near_miss
from ctpo_megatron.record.alarms.detectors import Detector, Growth, Level, Losses, Parts, Useful
from ctpo_megatron.record.alarms.progress import REWARD, Entropy, Fall, Form, Length, Plateau, Progress
from ctpo_megatron.record.alarms.signals import (
    Aborted,
    ClippedDeciles,
    ClipTilt,
    LateDrift,
    MixedGroups,
    TailTime,
    largest,
    metric,
    share,
)
from ctpo_megatron.record.alarms.slope import Slope
from ctpo_megatron.record.alarms.words import WORDS, Words
from ctpo_megatron.record.catalogue import CATALOGUE, find

SMOOTH = 5  # values that medians are taken of, where nothing else is said
LONG, LONGER = 10, 16  # the same of noisier ones, and of those that single prompts or hosts decide
MEMORY = "host/memory_used"

Found: TypeAlias = tuple[str, Alarm, Detector]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a run is, as far as detectors need it: groups and answers of a step, and the metric that says how good answers are."""

    groups: int
    answers: int
    quality: str = REWARD


@dataclass(frozen=True, slots=True)
class Kind:
    """An alarm of a run: its name, its settings, what judges rows, and its words."""

    name: str
    config: Alarm
    detector: Detector
    words: Words


def make_kinds(config: AlarmsConfig, measure: Measure) -> tuple[list[Kind], list[Progress]]:
    """Returns the alarms of a run, and what has to see each row before them.

    Raises ConfigError for a bound on a metric that is not in the catalogue.
    """
    reward, quality = Progress(REWARD, config.solved), Progress(measure.quality, config.solved)
    found = [*_of_answers(config, measure, reward, quality), *_of_ratios(config), *_of_machines(config, measure)]
    kinds = [Kind(name, section, detector, WORDS[name]) for name, section, detector in found]
    return [*kinds, *_own(config)], [reward, quality]


def _of_answers(config: AlarmsConfig, measure: Measure, reward: Progress, quality: Progress) -> Iterator[Found]:
    if (one := config.entropy) is not None:
        yield "entropy", one, Entropy(reward, one.share, one.collapsed, one.explosion)
    if (plateau := config.plateau) is not None:
        yield "plateau", plateau, Plateau(reward, plateau.steps)
    if (length := config.length) is not None:
        yield "length", length, Length(quality, length.factor)
    if (form := config.format) is not None:
        yield "format", form, Form(quality, form.rise)
    if (accuracy := config.accuracy) is not None:
        yield "accuracy", accuracy, Fall(accuracy.fall)
    if (equal := config.equal_groups) is not None:
        mixed = MixedGroups(LONG, config.solved)
        yield "equal_groups", equal, Level(mixed, equal.mixed, above=False, smooth=LONG, excused=mixed.solved)
    if (undecided := config.undecided) is not None:
        signal = share("reward/undecided", measure.answers)
        yield "undecided", undecided, Level(signal, undecided.share, above=True, smooth=SMOOTH)


def _of_ratios(config: AlarmsConfig) -> Iterator[Found]:
    size = config.baseline
    if (clip := config.clip) is not None:
        most = Level(ClippedDeciles(LONGER), clip.high, above=True, smooth=1)  # these two are smooth
        yield "clip", clip, Parts([most, Level(ClipTilt(LONGER), clip.tilt, above=True, smooth=1)])
    if (drift := config.drift) is not None:
        whole = Growth(metric("drift/mean"), drift.factor, size=size, smooth=SMOOTH, least=drift.least)
        yield "drift", drift, Parts([whole, Growth(LateDrift(drift.least), drift.late, size=size, smooth=LONG)])
    if (sample := config.sample_size) is not None:
        signal = metric("health/effective_sample_size")
        yield "sample_size", sample, Growth(signal, sample.share, size=size, smooth=SMOOTH, least=sample.least)
    if (mismatch := config.mismatch) is not None:
        signal = metric("train/correction_log")
        yield "mismatch", mismatch, Level(signal, -mismatch.log_weight, above=False, smooth=SMOOTH)
    if (experts := config.experts) is not None:
        yield "experts", experts, Level(largest("moe/load_max_over_mean/"), experts.most, above=True, smooth=SMOOTH)


def _of_machines(config: AlarmsConfig, measure: Measure) -> Iterator[Found]:
    size = config.baseline
    if (stale := config.stale) is not None:
        older = Growth(metric("rollout/staleness_mean"), stale.factor, size=size, smooth=LONG, least=stale.versions)
        lost = Level(Aborted(measure.groups, LONG), stale.aborted, above=True, smooth=1)
        yield "stale", stale, Parts([older, lost])
    if (servers := config.servers) is not None:
        tail = TailTime(LONGER, servers.tail)
        slow = Growth(tail, servers.factor, size=size, smooth=LONGER, excused=tail.short)
        yield "servers", servers, Parts([slow, Losses(servers.losses, servers.within)])
    if (memory := config.memory) is not None:
        yield "memory", memory, Slope(metric(MEMORY), memory.full, memory.ahead, memory.window)
    if (goodput := config.goodput) is not None:
        yield "goodput", goodput, Useful(goodput.share, goodput.window)


def _own(config: AlarmsConfig) -> Iterator[Kind]:
    for name, bound in config.bounds.items():
        _check_metric(name, bound)
        sides = [(limit, above) for limit, above in ((bound.above, True), (bound.below, False)) if limit is not None]
        parts = [Level(metric(bound.metric), limit, above=above, smooth=bound.smooth) for limit, above in sides]
        words = Words(f"{bound.metric} is out of its bounds", f"{bound.advice[:1].upper()}{bound.advice[1:]}.")
        yield Kind(name, bound, Parts(parts), words)


def _check_metric(name: str, bound: BoundAlarm) -> None:
    """Raise ConfigError where the metric of alarms.bounds.NAME is not one that a run records."""
    if find(bound.metric) is None:
        known = [each.name for each in CATALOGUE]
        raise ConfigError(
            f"alarms.bounds.{name}.metric: {bound.metric!r} is not a metric; docs/metrics.md lists them, and of a family one "
            f"member is named, such as health/clip_fraction/decile_9.{near_miss(bound.metric, known)}"
        )
