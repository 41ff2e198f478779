"""One inference server that only takes time: SGLang's scheduler, step by step, with events for requests and none for tokens.

    queue --(room in the cache)--> a batch of prompts is read, which stops decoding --> running --> answered

All that run get a token in each decoding step, so they are done in the order of the step at which each ends: a heap. How long a
step takes depends on how many run and on what they hold in the cache. New requests are read between two steps.

A publication pauses it. What it had cached is void then: requests in flight are read again, and their next tokens carry the new
version.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field

from ctpo_megatron.engine.load import Load
from ctpo_megatron.simulation.host import Host
from ctpo_megatron.simulation.meter import Meter
from ctpo_megatron.simulation.speeds import ServerSpeed

EPSILON = 1e-4  # of a decoding step: the event loop takes timers that are due within a nanosecond
INSTANT_S = 1e-8


@dataclass(frozen=True, slots=True)
class Part:
    """What a server gives of a request: tokens sampled, by the versions that sampled them."""

    spans: list[tuple[int, int]]  # (version, tokens), in their order

    @property
    def tokens(self) -> int:
        """Returns how many these are."""
        return sum(count for _, count in self.spans)


@dataclass(eq=False, slots=True)
class Request:
    """One request: `held` tokens to read, of which `cached` may lie at the server, and `wanted` tokens to sample."""

    session: int
    held: int
    wanted: int
    again: bool  # whether the session has another turn, which finds this one in the cache
    answer: asyncio.Future[Part | None]  # None: the server has failed
    waits: bool = True  # in the queue
    over: bool = False  # it was answered or taken away
    begun: float = 0.0  # the decoding step before its first token, once it runs
    version: int = 0  # that samples its first token
    marks: int = 0  # newer versions that had come by then

    @property
    def charge(self) -> float:
        """Returns the tokens that it holds in the cache, on average over its stay."""
        return self.held + self.wanted / 2


@dataclass(slots=True)
class Used:
    """Seconds of a server by what it did, and what came of it."""

    decode: float = 0.0
    prefill: float = 0.0
    paused: float = 0.0
    tokens: float = 0.0  # sampled
    requests: float = 0.0  # running, times seconds of decoding

    def __add__(self, other: Used) -> Used:
        return Used(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


@dataclass(eq=False, slots=True)
class SimulatedServer:
    """A server called `name`. Belongs to one event loop."""

    name: str
    speed: ServerSpeed
    host: Host
    meter: Meter
    used: Used = field(default_factory=Used)
    version: int = 0
    _step: float = 0.0  # decoding steps so far
    _at: float = 0.0  # when that was
    _read_until: float = 0.0  # a batch of prompts is read until then
    _paused: bool = False
    _queue: deque[Request] = field(default_factory=deque)
    _running: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap by the step at which each ends
    _alive: int = 0  # of these
    _held: float = 0.0  # tokens in the cache
    _charged: float = 0.0  # that those running hold on average
    _marks: list[tuple[float, int]] = field(default_factory=list)  # (step, version from there on)
    _cached: dict[int, int] = field(default_factory=dict)  # tokens by session
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _timer: asyncio.TimerHandle | None = None
    _working: bool = False

    def __post_init__(self) -> None:
        self.host.listen(self.settle)

    # ---- what others do to it

    def add(self, request: Request) -> None:
        """Put `request` into the queue."""
        with self.meter:
            self._advance()
            if not self._alive and not self._queue:
                self._read_until = max(self._read_until, self._at + self.speed.gather_s)
            self._queue.append(request)
            self._plan()

    def leave(self, request: Request) -> None:
        """Answer `request` with what there is, and forget it."""
        with self.meter:
            if request.over:
                return
            self._advance()
            sampled = 0 if request.waits else math.floor(self._step - request.begun + EPSILON)
            self._answer(request, min(sampled, request.wanted))
            self._plan()

    def drop(self, request: Request) -> None:
        """Forget `request`: nobody waits for its answer any more."""
        with self.meter:
            if not request.over:
                self._advance()
                self._remove(request)
                self._plan()

    def pause(self) -> None:
        """Finish the step that runs, and sample nothing until `resume`."""
        with self.meter:
            self._advance()
            left = max(0.0, math.ceil(self._step - EPSILON) - self._step)
            self._step, self._held = self._step + left, self._held + left * self._alive
            self._paused = True
            self._plan()

    def resume(self, version: int) -> None:
        """Go on, under `version`; what runs is read again."""
        with self.meter:
            self._advance()
            self._paused, self.version = False, version
            self._marks.append((self._step, version))
            self._cached.clear()
            again = self._held if self._alive else 0.0
            self._read_until = self._at + (self._prefill_s(again) if again else 0.0)
            self._finish_due()
            self._plan()

    def fail(self) -> None:
        """Lose all that it has: each request is answered with None."""
        with self.meter:
            self._advance()
            for request in [*self._queue, *(each for *_, each in self._running)]:
                if not request.over:
                    self._remove(request)
                    if not request.answer.done():
                        request.answer.set_result(None)
            self._queue.clear()
            self._running.clear()
            self._cached.clear()
            self._held = self._charged = 0.0
            self._read_until, self._paused = self._at, False
            self._plan()

    def load(self) -> Load:
        """Returns how busy it is, as SGLang tells it."""
        with self.meter:
            self._advance()
            return Load(self._alive, len(self._queue), 0, min(1.0, self._held / self.speed.cache_tokens))

    def settle(self) -> None:
        """Reckon up to now, and plan anew: its host becomes slower or faster."""
        with self.meter:
            self._advance()
            self._plan()

    # ---- the scheduler

    def _advance(self) -> None:
        """Let it be now."""
        now = asyncio.get_running_loop().time()
        elapsed, self._at = now - self._at, now
        if elapsed <= 0:
            return
        if self._paused:
            self.used.paused += elapsed
            return
        reading = min(elapsed, max(0.0, self._read_until - (now - elapsed)))
        if self._alive:
            self.used.prefill += reading
        decoding = elapsed - reading
        if self._alive and decoding > 0:
            steps = self.speed.steps_in(decoding / self.host.slowness, self._alive, self._held)
            self._step += steps
            self._held += steps * self._alive
            self.used.decode += decoding
            self.used.requests += decoding * self._alive

    def _plan(self) -> None:
        """Set the timer to what happens next: a batch of prompts, or the end of a request."""
        busy = bool(self._alive or self._queue) and not self._paused
        if busy != self._working:
            self._working = busy
            self.host.take(1.0 if busy else -1.0)
        when = self._next() if busy else None
        if self._timer is not None:
            if when is not None and self._at < self._timer.when() <= when:
                return  # it fires too early, and looks again
            self._timer.cancel()
            self._timer = None
        if when is not None:
            self._timer = asyncio.get_running_loop().call_at(when, self._fire)

    def _next(self) -> float | None:
        start = max(self._at, self._read_until)
        steps = math.inf
        if self._queue and self._has_room(self._queue[0]):
            steps = max(0.0, math.ceil(self._step - EPSILON) - self._step)
        while self._running and self._running[0][2].over:
            heapq.heappop(self._running)
        if self._running:
            steps = min(steps, max(0.0, self._running[0][0] - self._step))
        if math.isinf(steps):
            return None
        return start + self.host.slowness * (self.speed.decode_s(steps, self._alive, self._held) if steps else 0.0)

    def _fire(self) -> None:
        with self.meter:
            self._timer = None
            self._advance()
            if self._at >= self._read_until - INSTANT_S and not self._paused:
                self._finish_due()
                if self._queue and abs(self._step - round(self._step)) < EPSILON:
                    self._step = float(round(self._step))
                    self._read()
            self._plan()

    def _finish_due(self) -> None:
        while self._running and (self._running[0][2].over or self._running[0][0] <= self._step + EPSILON):
            request = heapq.heappop(self._running)[2]
            if not request.over:
                self._answer(request, request.wanted)

    def _read(self) -> None:
        """Take requests from the queue as long as there is room, and read them: that gives each its first token."""
        fresh, taken = 0, False
        while self._queue and fresh < self.speed.max_prefill_tokens and self._has_room(self._queue[0]):
            request = self._queue.popleft()
            fresh += request.held - min(self._cached.pop(request.session, 0), request.held - 1)
            request.waits, request.begun = False, self._step - 1
            request.version, request.marks = self.version, len(self._marks)
            self._alive += 1
            self._held += request.held + 1
            self._charged += request.charge
            heapq.heappush(self._running, (request.begun + request.wanted, next(self._numbers), request))
            taken = True
        if taken:
            self._read_until = self._at + self._prefill_s(fresh) * self.host.slowness

    def _prefill_s(self, tokens: float) -> float:
        batches = max(1, math.ceil(tokens / self.speed.max_prefill_tokens))
        return batches * self.speed.prefill_s + tokens * self.speed.prefill_token_s

    def _has_room(self, request: Request) -> bool:
        if self._alive >= self.speed.max_running:
            return False
        return not self._alive or self._charged + request.charge <= self.speed.cache_tokens

    def _answer(self, request: Request, sampled: int) -> None:
        if request.again:
            self._cached[request.session] = request.held + sampled
        spans = self._spans(request, sampled)
        self._remove(request)
        self.used.tokens += sampled
        if not request.answer.done():
            request.answer.set_result(Part(spans))

    def _remove(self, request: Request) -> None:
        request.over = True
        if request.waits:
            self._queue.remove(request)
            return
        self._alive -= 1
        self._charged -= request.charge
        self._held -= request.held + max(0.0, self._step - request.begun)
        if not self._alive:  # nobody is in the middle of a step any more
            self._held = self._charged = 0.0
            self._step = float(math.ceil(self._step - EPSILON))

    def _spans(self, request: Request, sampled: int) -> list[tuple[int, int]]:
        """Returns which version sampled how many of the first `sampled` tokens."""
        found: list[tuple[int, int]] = []
        begun, version = 0, request.version
        for step, newer in self._marks[request.marks :]:
            at = min(math.floor(step - request.begun + EPSILON), sampled)
            if at > begun:
                found.append((version, at - begun))
            begun, version = at, newer
        if sampled > begun:
            found.append((version, sampled - begun))
        return found
