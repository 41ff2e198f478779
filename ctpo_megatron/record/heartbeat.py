"""What a process is doing, for whoever watches it: stages that beat, how long each is usually silent, and when one is late.

    with stages("update", step=41) as stage:     entered: a beat
        ... stage.beat("micro-batch 3") ...      every sign of life is a beat
                                                 left: the longest silence of this stage joins the history of its name

A stage is late when it has been silent for longer than `deadline_s`: three times its usual longest silence and ten seconds. So a
training step that takes an hour and beats every two seconds is missed after a minute, not after three hours.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

TIMES = 3.0  # of the usual silence
MARGIN_S = 10.0
REMEMBERED = 32  # of the last stages of a name


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a stage may be silent: at least `floor_s`, and `first_s` where none of its name has ended yet."""

    floor_s: float
    first_s: float

    def deadline_s(self, usual_s: float | None) -> float:
        """Returns the longest silence in seconds that is allowed to a stage whose usual one is `usual_s`; None: not known."""
        return self.first_s if usual_s is None else max(self.floor_s, TIMES * usual_s) + MARGIN_S


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing that a process is doing, as it was at a moment."""

    name: str
    step: int | None
    detail: str
    seconds: float  # since it was entered
    silent_s: float  # since its last beat
    usual_s: float | None  # the usual longest silence of stages of this name; None: none has ended yet
    waits_for: str  # what it waits for, in words; empty: it works itself
    thread: int  # Python's identifier of the thread that entered it
    native_thread: int  # the system's

    def __str__(self) -> str:
        step = "" if self.step is None else f" of step {self.step}"
        return f"{self.name}{step}" + (f", {self.detail}" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Pulse:
    """The answer of a process that is asked whether it lives. `processes`: others that it answers for, by name."""

    pid: int
    node: str
    stages: tuple[Stage, ...] = ()
    processes: tuple[tuple[str, int], ...] = ()
    beats: int = 0  # signs of life of those others
    memory: int = 0  # resident bytes of all of them; 0: not known


class OpenStage:
    """A stage that was entered and not yet left. Any thread may let it beat."""

    __slots__ = ("_clock", "begun", "detail", "last", "longest_s", "name", "native_thread", "step", "thread", "waits_for")

    def __init__(self, name: str, step: int | None, detail: str, waits_for: str, clock: Callable[[], float]) -> None:
        self.name, self.step, self.detail, self.waits_for = name, step, detail, waits_for
        self.thread, self.native_thread = threading.get_ident(), threading.get_native_id()
        self._clock = clock
        self.begun = self.last = clock()
        self.longest_s = 0.0

    def beat(self, detail: str | None = None) -> None:
        """Note a sign of life; `detail`: what the stage is at now."""
        now = self._clock()
        self.longest_s = max(self.longest_s, now - self.last)
        self.last = now
        if detail is not None:
            self.detail = detail


class Stages:
    """The stages that a process is in; several where several threads or tasks work. Safe to use from all threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[int, OpenStage] = {}
        self._silences: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, name: str, *, step: int | None = None, detail: str = "", waits_for: str = "") -> Iterator[OpenStage]:
        """A context in which this process is in the stage `name`."""
        stage = self.enter(name, step=step, detail=detail, waits_for=waits_for)
        try:
            yield stage
        finally:
            self.leave(stage)

    def enter(self, name: str, *, step: int | None = None, detail: str = "", waits_for: str = "") -> OpenStage:
        """The stage `name`, which this process is in until `leave`."""
        stage = OpenStage(name, step, detail, waits_for, self._clock)
        with self._lock:
            self._open[id(stage)] = stage
        return stage

    def leave(self, stage: OpenStage) -> None:
        """End a stage; its longest silence joins the history of its name. Safe to call twice."""
        stage.beat()
        with self._lock:
            if self._open.pop(id(stage), None) is not None:
                self._silences.setdefault(stage.name, deque(maxlen=REMEMBERED)).append(stage.longest_s)

    def beat(self) -> None:
        """Note a sign of life that any of the open stages may have given."""
        with self._lock:
            found = list(self._open.values())
        for stage in found:
            stage.beat()

    def usual_s(self, name: str) -> float | None:
        """The median of the longest silences of the last stages of this name that ended; None where none has."""
        with self._lock:
            known = self._silences.get(name)
            return statistics.median(known) if known else None

    def now(self) -> tuple[Stage, ...]:
        """What this process is doing, the stage that was entered first first; empty: nothing, it waits to be told."""
        with self._lock:
            found = list(self._open.values())
        now = self._clock()
        return tuple(
            Stage(
                each.name,
                each.step,
                each.detail,
                now - each.begun,
                max(0.0, now - each.last),
                self.usual_s(each.name),
                each.waits_for,
                each.thread,
                each.native_thread,
            )
            for each in found
        )


def stage(name: str) -> Callable[[F], F]:
    """Decorate a method of an object that has `stages`: each call is a stage of that name, at the step that is its `version`."""

    def decorate(method: F) -> F:
        parameters = list(inspect.signature(method).parameters)
        place = parameters.index("version") - 1 if "version" in parameters else None  # without self

        @functools.wraps(method)
        def staged(self: Any, *args: Any, **kwargs: Any) -> Any:
            step = args[place] if place is not None and place < len(args) else kwargs.get("version")
            with self.stages(name, step=step):
                return method(self, *args, **kwargs)

        return staged  # type: ignore[return-value]

    return decorate


class Depths:
    """How many tasks wait for something, and since when the one that has waited longest does. For one event loop.

    `with depths("python tool"): await tool.run(code)`
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[str, dict[int, float]] = {}  # in the order in which they came
        self._numbers = 0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A context in which one more task waits for `name`."""
        self._numbers += 1
        number, waiting = self._numbers, self._waiting.setdefault(name, {})
        waiting[number] = self._clock()
        try:
            yield
        finally:
            del waiting[number]

    def now(self) -> dict[str, tuple[int, float]]:
        """For everything that was ever waited for: how many tasks wait now, and the longest wait among them in seconds."""
        now = self._clock()
        return {
            name: (len(waiting), now - next(iter(list(waiting.values())), now)) for name, waiting in list(self._waiting.items())
        }
