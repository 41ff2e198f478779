"""The alarms of a run that goes on: told as they are raised and cleared, with what follows from them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
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
from ctpo_megatron.record.alarms.replay import Memory, settle
from ctpo_megatron.record.alarms.signals import Row
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.alarms.webhook import Webhook, read_header
from ctpo_megatron.record.events import Emit, Event
from ctpo_megatron.record.story import Happened

Told = AlarmRaised | AlarmCleared


class RunAlarms:
    """Alarms of a run, as `make` makes them.

    `begin` comes first. `row` is given each row of metrics as it is written. Call it with each event, too.
    """

    def __init__(self, make: Callable[[], Alarms], emit: Emit, webhook: Webhook | None = None) -> None:
        self._make, self._emit, self._webhook = make, emit, webhook
        self._alarms = make()
        self._wishes: list[AlarmRaised] = []
        self._waiting: list[Happened] | None = None  # heard while files are read; None: they are not
        self._heard = 0  # events of the run
        self._memory: tuple[tuple[int, int], Memory | None] | None = None  # as it was after so many rows and events

    async def begin(self, run_dir: Path, memory: Memory | None = None) -> None:
        """Bring them to where the run in `run_dir` is: what it had told of and is not so any more is cleared at once.

        `memory`: what they remembered when its checkpoint was made. Files are read in a thread. Raises InputError for damage.
        """
        events = run_dir / "events.jsonl"
        size = events.stat().st_size if events.exists() else 0  # of what comes behind it they hear
        self._waiting = []
        self._alarms, told, self._heard = await asyncio.to_thread(settle, self._make, run_dir, memory, size)
        waiting, self._waiting = self._waiting, None
        for happened in waiting:
            self._hear(happened)
        for each in told:
            self._emit(each)  # late, so that nothing follows from it

    def __call__(self, event: Event) -> None:
        """Let the detectors hear of an event."""
        happened = Happened(time(), event.name, asdict(event))
        if self._waiting is None:
            self._hear(happened)
        else:
            self._waiting.append(happened)

    def _hear(self, happened: Happened) -> None:
        self._heard += 1
        if happened.name not in (AlarmRaised.name, AlarmCleared.name):
            self._alarms.event(happened)

    def memory(self) -> Memory | None:
        """Returns what they remember, as JSON values for `begin`; None where all has to be read again."""
        now = self._alarms.rows, self._heard
        if self._memory is None or self._memory[0] != now:
            memory = self._alarms.memory()
            self._memory = now, None if memory is None else {**memory, "events": self._heard}
        return self._memory[1]

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

    async def alarms_of(self, config: RunConfig, run_dir: Path, emit: Emit, memory: Memory | None = None) -> RunAlarms:
        """Returns the alarms of a loop that begins, over the rows that the run has by now; they hear of events from here on.

        `memory`: see `RunAlarms.begin`.
        """
        alarms = RunAlarms(lambda: Alarms(config.alarms, measure_of(config)), emit, self._webhook)
        self._alarms = alarms  # in the place of those of a loop that has ended
        await alarms.begin(run_dir, memory)
        return alarms

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
