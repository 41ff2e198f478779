"""Brings a policy version to the servers, and proves that they hold it: docs/weights.md has the whole protocol.

    prepare -> connect, if servers have changed -> pause -> send -> digests -> version, empty caches -> resume -> canary -> serve

Servers that share the trainer's memory sleep between two publications: they take memory for weights again before these are sent,
and for the KV cache after the digests, when the senders have given back their buckets.

A server that fails at any step is named and suspended, and tried once more from scratch; then it is lost, and the others go on.
One that gives no sign of life is lost at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.engine.checksums import read_digests
from ctpo_megatron.engine.control import PromptRecord, ServerControl
from ctpo_megatron.engine.fleet import MEMORY, UP, Fleet, Member, Memory, State
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import EngineError, WeightSyncError
from ctpo_megatron.record import PhaseTimer
from ctpo_megatron.record.heartbeat import Stages
from ctpo_megatron.types import RoutingShape
from ctpo_megatron.weights.proof.attest import attest
from ctpo_megatron.weights.proof.canary import canary_gap, canary_tokens
from ctpo_megatron.weights.proof.verdicts import CanaryVerdicts
from ctpo_megatron.weights.protocol import Sent, Server

PAUSE_TIMEOUT_S = 60.0  # to stop sampling, to open a session, to give memory back; it takes one forward at most
ALIVE_TIMEOUT_S = 10.0  # to say anything at all, after a failure
ATTEMPTS = 2  # at one server in one publication
WEIGHTS: tuple[Memory] = ("weights",)
PHASES = ("gather", "digest", "send", "wait")  # of the senders' own seconds


class WeightSource(Protocol):
    """What the publisher asks of the trainer; every call ends within a bounded time."""

    async def connect(self, servers: list[Server], api_key: str) -> None:
        """Let the senders reach `servers`, and no others; the next publication is a full one. Raises WeightSyncError."""
        ...

    async def prepare(self, version: int) -> None:
        """Gather the first bucket of what `publish` will send; the servers sample meanwhile."""
        ...

    async def publish(self, version: int) -> Sent:
        """All ranks export, the senders send. Raises WeightSyncError, naming the servers that failed; then `connect` again."""
        ...

    async def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        """Log-probs of tokens 1, 2, ... of a prompt, with the weights as they are.

        `experts`: those that its tokens are to go to, [tokens, expert layers, top_k]; None: the trainer's routers choose.
        """
        ...


@dataclass(frozen=True, slots=True)
class Proof:
    """The standard that a server has to meet before anything is sampled from it."""

    layout: EngineLayout  # of one server
    vocab_size: int
    tolerance: float  # of the mean difference of log-probs, see `weights.proof.canary`
    texts: Sequence[Sequence[int]] = ()  # token ids that canary prompts are made of; empty: of random tokens
    routing: RoutingShape | None = None  # how the model routes, where the servers report experts for the trainer to follow


class WeightPublisher:
    """Brings the trainer's weights to the servers of a fleet. Call it while the trainer is idle, one call after the other.

    `session`: whether the transport wants an update session open. `release`: whether servers give back their memory in
    `offload`.
    `timeout_s` bounds each step at each server. `stages`: the phases of a publication are stages of this process too.
    """

    def __init__(
        self,
        fleet: Fleet,
        control: ServerControl,
        trainer: WeightSource,
        proof: Proof,
        *,
        api_key: str,
        timeout_s: float,
        session: bool = True,
        release: bool = False,
        stages: Stages | None = None,
    ) -> None:
        self._fleet = fleet
        self._control = control
        self._trainer = trainer
        self._proof = proof
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._session = session
        self._release = release
        self._stages = stages
        self._version = 0
        self._connected: list[Member] = []
        self._history: list[Sent] = []  # of the two newest versions
        self._verdicts = CanaryVerdicts(0)  # of the canaries of this version

    async def publish(self, version: int) -> dict[str, float]:
        """Seconds by phase, counts of servers, and `publish/changed`, after all servers that are up hold `version`.

        Those that are set aside keep what they have. Generations in flight go on under it from their next token.
        `publish/changed` is the share of the servers' tensors that differ from the version before: 0 after a step that moved the
        weights means that old ones were sent, as both ends agree. Servers that fail twice are lost; those that are being started
        are left to `heal`. Raises WeightSyncError when no server is left, and when the canaries say that none of them can be
        brought to compute what the trainer computes.
        """
        self._version = version
        self._verdicts = CanaryVerdicts(version)
        self._fleet.awake()
        timer = self._timer()
        with timer("total"):
            await self._bring_up(self._fleet.publishable(*UP), timer)
            while behind := [each for each in self._fleet.publishable(State.SERVING) if each.version != version]:
                await self._bring_up(behind, timer)  # given back after the others had been chosen
        if self._fleet.hopeless:
            raise WeightSyncError(f"version {version} of the weights reached no inference server:\n{self._fleet.report()}")
        seconds = {f"publish/{phase}": seconds for phase, seconds in timer.seconds.items()}
        return seconds | self._verdicts.metrics() | self._changed() | self._fleet.metrics()

    def _timer(self) -> PhaseTimer:
        return PhaseTimer(stages=self._stages, step=self._version, prefix="publish/")

    @property
    def digest(self) -> str:
        """Tells the weights that were published last from all others: the same for the same numbers in the servers' layout.

        Raises RuntimeError before there are any.
        """
        if not self._history:
            raise RuntimeError("no weights were published yet")
        digests = [sorted(found.items()) for found in self._history[-1].digests]
        return hashlib.blake2b(repr(digests).encode(), digest_size=16).hexdigest()

    def _changed(self) -> dict[str, float]:
        """The share of tensors that differ from the version before; nothing where only one version has been sent."""
        if len(self._history) < 2:
            return {}
        before, now = ([value for rank in sent.digests for _, value in sorted(rank.items())] for sent in self._history)
        return {"publish/changed": sum(old != new for old, new in zip(before, now, strict=True)) / max(len(now), 1)}

    async def offload(self) -> None:
        """Let all servers that are up give back their memory until the next publication; without `release` nothing happens.

        A server that fails is suspended, or lost if it gives no sign of life. Generations in flight wait, and keep their tokens.
        """
        if self._release:
            attempt = _Attempt(self._fleet.offload())
            await attempt.each(self._sleep)
            await self._drop_blamed(attempt, Counter())

    async def heal(self) -> None:
        """Bring servers that are up but do not serve to the current version. The trainer must still hold that version."""
        waiting = self._fleet.publishable(State.JOINING, State.SUSPENDED)
        if waiting:
            await self._bring_up(waiting, self._timer())
        if self._fleet.hopeless:
            raise WeightSyncError(f"no inference server is left:\n{self._fleet.report()}")

    async def _bring_up(self, members: list[Member], timer: PhaseTimer) -> None:
        """Publish to `members` until each serves or is lost. Every attempt that fails names a server, so this ends."""
        failures: Counter[str] = Counter()
        while members:
            attempt = _Attempt(members)
            await self._publish_once(attempt, timer)
            self._verdicts.check_curable()
            if attempt.blamed:
                self._connected = []
            await self._drop_blamed(attempt, failures)
            members = [member for member in members if member.state in UP and member.state is not State.SERVING]

    async def _drop_blamed(self, attempt: _Attempt, failures: Counter[str]) -> None:
        """Suspend those that failed in `attempt`; lose those that did too often, by `failures`, or give no sign of life."""
        answers = await asyncio.gather(*(self._answers(member) for member in attempt.blamed))
        for (member, reason), alive in zip(attempt.blamed.items(), answers, strict=True):
            failures[member.url] += 1
            if alive and failures[member.url] < ATTEMPTS:
                self._fleet.suspend(member, reason)
            elif member.state in UP:  # its death may be known already
                self._fleet.lose(member, reason)

    async def _answers(self, member: Member) -> bool:
        """Whether `member` gives a sign of life. One that hangs must end: others may be held up with it in a broken broadcast."""
        try:
            await self._control.version(member.url, timeout_s=min(ALIVE_TIMEOUT_S, self._timeout_s))
        except EngineError:
            return False
        return True

    async def _publish_once(self, attempt: _Attempt, timer: PhaseTimer) -> None:
        """Publish once to the members of `attempt`, which afterwards knows which of them failed; the others serve.

        Where sending fails, no member serves: what has arrived is undefined at all of them. So the method ends there.
        """
        if any(member.version is None for member in attempt.left):  # it is not known what it holds
            self._connected = []
        if attempt.left:
            with timer("prepare"):
                await self._trainer.prepare(self._version)
        connected = await self._connect(attempt, timer)
        self._fleet.update(attempt.left)  # also after a failure: those that are left are tried again
        if not connected:
            return
        with timer("paused"):
            with timer("pause"):
                await attempt.each(self._pause)
            await self._wake(attempt, WEIGHTS, timer)
            if self._session:
                with timer("pause"):
                    await attempt.each(lambda member: self._control.open_update(member.url, timeout_s=self._limit))
            sent = await self._send(attempt, timer)
            if sent is None:
                return
            with timer("attest"):
                await attempt.each(lambda member: self._install(member, sent))
            await self._wake(attempt, MEMORY, timer)
            await attempt.each(lambda member: self._control.resume(member.url, timeout_s=self._timeout_s))
        with timer("canary"):
            await self._canary(attempt)
        self._fleet.serve(attempt.left, self._version)

    @property
    def _limit(self) -> float:
        """Seconds for steps that are quick."""
        return min(PAUSE_TIMEOUT_S, self._timeout_s)

    async def _pause(self, member: Member) -> None:
        await self._control.pause(member.url, timeout_s=self._limit)

    async def _sleep(self, member: Member) -> None:
        """Give back all memory that the server has."""
        await self._pause(member)
        kinds = MEMORY - member.given_back
        if kinds:
            member.given_back = MEMORY  # also if no answer comes in time: a server does what it is told, one after the other
            await self._control.sleep(member.url, kinds, timeout_s=self._limit)

    async def _wake(self, attempt: _Attempt, kinds: Collection[Memory], timer: PhaseTimer) -> None:
        """Let the members that have given back memory of these `kinds` take it again."""

        async def wake(member: Member) -> None:
            asleep = member.given_back.intersection(kinds)
            if asleep:
                member.given_back -= asleep
                await self._control.wake(member.url, asleep, timeout_s=self._limit)

        if any(member.given_back for member in attempt.left):
            with timer("wake"):
                await attempt.each(wake)

    async def _connect(self, attempt: _Attempt, timer: PhaseTimer) -> bool:
        """Let the senders reach the members of `attempt`, unless they do already. Whether that went well."""
        members = attempt.left
        if not members or members == self._connected:
            return True
        self._connected = []
        try:
            with timer("connect"):
                await self._trainer.connect([Server(member.url, member.tp) for member in members], self._api_key)
        except WeightSyncError as error:
            attempt.blame(error)
            return False
        self._connected = members
        return True

    async def _send(self, attempt: _Attempt, timer: PhaseTimer) -> Sent | None:
        """What was sent; None when a server failed."""
        # again, without members that have failed since: they would be waited for
        if not await self._connect(attempt, timer) or not attempt.left:
            return None
        try:
            with timer("transfer"):
                sent = await self._trainer.publish(self._version)
        except WeightSyncError as error:
            attempt.blame(error)
            return None
        self._history = [*[old for old in self._history if old.version != sent.version][-1:], sent]
        for phase in PHASES:
            timer.seconds[phase] = timer.seconds.get(phase, 0.0) + sent.seconds.get(phase, 0.0)
        return sent

    async def _install(self, member: Member, sent: Sent) -> None:
        """Prove that the server holds what was sent, and let it answer as the new version, with an empty cache."""
        limit = self._timeout_s
        if self._session:
            await self._control.close_update(member.url, timeout_s=limit)
        reported = read_digests(await self._control.checksums(member.url, timeout_s=limit), member.url)
        attest(self._proof.layout, self._version, sent.digests, {member.url: reported})
        await self._control.set_version(member.url, self._version, timeout_s=limit)
        version = await self._control.version(member.url, timeout_s=limit)
        if version != str(self._version):
            raise WeightSyncError(f"{member.url} reports version {version} of the weights; it was given {self._version}")

    async def _canary(self, attempt: _Attempt) -> None:
        """Prove that the servers compute what the trainer computes; all of them are asked at once."""
        tokens = canary_tokens(self._proof.vocab_size, self._version, self._proof.texts)
        said: dict[Member, PromptRecord] = {}

        async def ask(member: Member) -> None:
            said[member] = await self._control.read_prompt(
                member.url, tokens, routing=self._proof.routing, timeout_s=self._timeout_s
            )

        expected: dict[Member, list[float]] = {}
        if self._proof.routing is None:
            logp, _ = await asyncio.gather(self._trainer.canary_logp(tokens), attempt.each(ask))
            expected = dict.fromkeys(said, logp)
        else:  # each server has gone its own way through the experts
            await attempt.each(ask)
            for member, record in said.items():
                expected[member] = await self._trainer.canary_logp(tokens, record.experts)

        async def check(member: Member) -> None:
            gap = canary_gap(expected[member], said[member].logp)
            self._verdicts.judge(member.name, member.url, gap, self._proof.tolerance)

        await attempt.each(check)


class _Attempt:
    """One publication to some servers: those that are still in it, and those that failed, each with its reason."""

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = list(members)
        self.blamed: dict[Member, str] = {}

    @property
    def left(self) -> list[Member]:
        """The members that have neither failed nor died meanwhile."""
        return [member for member in self._members if member not in self.blamed and member.state in UP]

    async def each(self, step: Callable[[Member], Awaitable[None]]) -> None:
        """Take a step at all that are left, at once; those that fail are blamed."""
        members = self.left
        outcomes = await asyncio.gather(*(step(member) for member in members), return_exceptions=True)
        for member, outcome in zip(members, outcomes, strict=True):
            if isinstance(outcome, (EngineError, WeightSyncError)):
                self.blamed[member] = str(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome

    def blame(self, error: WeightSyncError) -> None:
        """Blame the members that the error names; all that are left where it names none of them."""
        named = [member for member in self.left if member.url in error.servers]
        for member in named or self.left:
            self.blamed[member] = str(error)
