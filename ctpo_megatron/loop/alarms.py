"""The alarms of a run that goes on: told as they are raised and cleared, with what follows from them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from time import time

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.rewards import FormatTerm, LengthTerm, ToolUseTerm, parts
from ctpo_megatron.loop.orders import Orders, StopRequest
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms.kinds import Measure
from ctpo_megatron.record.alarms.progress import REWARD
from ctpo_megatron.record.alarms.replay import settle
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.alarms.webhook import Webhook, read_header
from ctpo_megatron.record.events import Emit, Event
from ctpo_megatron.record.story import Happened

Told = AlarmRaised | AlarmCleared


class RunAlarms:
    """Alarms of the run in `run_dir`, where it is by now: what it had told of and is not so any more is cleared at once.

    `row` is given each row of metrics as it is written. Call it with each event, too.
    """

    def __init__(self, alarms: Alarms, run_dir: Path, emit: Emit, webhook: Webhook | None = None) -> None:
        self._alarms, self._emit, self._webhook = alarms, emit, webhook
        self._wishes: list[AlarmRaised] = []
        for told in settle(alarms, run_dir):
            emit(told)  # late, so that nothing follows from it

    def __call__(self, event: Event) -> None:
        """Let the detectors hear of an event."""
        if not isinstance(event, AlarmRaised | AlarmCleared):
            self._alarms.event(Happened(time(), event.name, asdict(event)))

    def row(self, row: Row) -> list[Told]:
        """Tell what the next row raises and clears; returns it."""
        told = self._alarms.row(row)
        for each in told:
            self._emit(each)
        self._wishes += [each for each in told if isinstance(each, AlarmRaised)]
        trouble = None if self._webhook is None else self._webhook.trouble()
        if trouble is not None:
            self._emit(trouble)
        return told

    def obey(self, orders: Orders) -> None:
        """Let the run save or stop where an alarm that was raised since the last time wants it."""
        for each in self._wishes:
            if each.then == "save":
                orders.save()
            elif each.then == "stop":
                orders.stop(StopRequest(f"alarm {each.alarm}: {each.what}"))
        self._wishes.clear()


class Hearing:
    """A reader of a run's events: passes them on to the alarms of the loop that runs, and alarms to the webhook."""

    def __init__(self, webhook: Webhook | None) -> None:
        self._webhook = webhook
        self._alarms: RunAlarms | None = None

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        for each in (self._alarms, self._webhook):
            if each is not None:
                each(event)

    def alarms_of(self, config: RunConfig, run_dir: Path, emit: Emit) -> RunAlarms:
        """Returns the alarms of a loop that begins, over the rows that the run has by now; they hear of events from here on."""
        self._alarms = None  # those of a loop that has ended
        self._alarms = RunAlarms(Alarms(config.alarms, measure_of(config)), run_dir, emit, self._webhook)
        return self._alarms

    def sending(self) -> AbstractAsyncContextManager[None]:
        """Returns the context in which alarms are posted."""
        return contextlib.nullcontext() if self._webhook is None else self._webhook.sending()


def open_hearing(config: RunConfig) -> Hearing:
    """Returns what hears of the events of a run. Raises ConfigError for alarms of unknown metrics, or a header that is none."""
    Alarms(config.alarms, measure_of(config))
    hook = config.alarms.webhook
    return Hearing(None if hook is None else Webhook(hook, config.name, read_header(hook.header_file)))


def measure_of(config: RunConfig) -> Measure:
    """Returns what a run of `config` is to its alarms. Of a reward of several terms, the first that judges answers says how good
    they are, as in evaluations."""
    groups = config.train.prompts_per_step
    terms = [name for name, each in parts(config.rollout.reward) if not isinstance(each, FormatTerm | LengthTerm | ToolUseTerm)]
    is_sum = len(parts(config.rollout.reward)) > 1
    return Measure(groups, groups * config.rollout.group_size, f"reward/term/{terms[0]}" if is_sum and terms else REWARD)


def as_markdown(told: Told) -> str:
    """Returns an alarm, or its end, as a paragraph for TensorBoard."""
    return told.sentence.replace("`", "'").replace("<", "&lt;")


def numbers(metrics: Mapping[str, object]) -> Row:
    """Returns a row as it was written to metrics.jsonl, with numbers that are not finite as numbers again."""
    return {name: float(value) for name, value in metrics.items()}  # type: ignore[arg-type]
