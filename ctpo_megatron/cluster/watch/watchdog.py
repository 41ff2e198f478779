"""Asks every process of a run whether it lives, lets the system look at it, and acts when one is stopped or late.

    pulse (an actor's own thread) ---+
    witness (the node's /proc) ------+--> judge --> event, report --> a server is lost to the fleet, which starts it again
    evidence, when one is late ------+                            +-> a trainer rank ends the guarded work with TrainerLost
                                                              +-> of Ray's processes the death is noticed (`ray_watch`)

The question stands in a concurrency group of its own, so it is answered while the actor works; at most one question to an actor
is open at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from ctpo_megatron.cluster.calls import Process
from ctpo_megatron.cluster.watch.nodes import Place, Witnesses
from ctpo_megatron.config.cluster import WatchConfig
from ctpo_megatron.errors import CtpoError, StorageError, TrainerLost
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.heartbeat import Depths, OpenStage, Patience, Pulse, Stages
from ctpo_megatron.record.stall_report import Scene, next_report, write_report
from ctpo_megatron.record.stalls import SILENT_S, STOPPED, Evidence, Seen, Verdict, judge, late, stopped
from ctpo_megatron.record.watch_events import StallFound

EVERY_S = 1.0  # the system looks
ASK_S = 2.0  # a question to an actor costs more: 3 ms at either end, and as much in Ray
AT_MOST_A_SECOND = 100.0  # questions, of a driver that has other things to do
EVIDENCE_S = 3.0
OVERSLEPT_S = 5.0  # the driver itself was stopped or did not come to its turn: what others did meanwhile was not seen
AGAIN_S = 60.0  # between reports of something that the run does nothing about
JUDGE_S = 5.0  # meanwhile it is judged again: to ask the ranks where they are costs them something
GROUP = "pulse"  # the actors' concurrency group


@dataclass(eq=False)
class Watched:
    """A process that is watched: an actor, with the processes that it answers for.

    `state`: what a server is used for. `hung`: what to do when it hangs, instead of ending the run. `restarts`: the key that says
    how often it is then started again.
    """

    process: Process
    rank: int | None = None
    state: Callable[[], str] | None = None
    hung: Callable[[str], None] | None = None
    restarts: str = "rollout.engine.restarts"
    answered: float = field(default_factory=time.monotonic)
    pulse: Pulse | None = None
    gone: bool = False  # Ray says so, and tells others too
    _asked: float = -math.inf
    _call: asyncio.Future[Any] | None = None
    _stages: Stages = field(default_factory=Stages)  # of a server, kept here: it does not know what it is used for
    _stage: OpenStage | None = None

    def ask(self) -> None:
        """Take the answer to the last question, if it is there, and ask again when it is time."""
        if self._call is not None:
            if not self._call.done():
                return
            call, self._call = self._call, None
            try:
                self._heard(call.result())
            except (RayError, CtpoError):
                self.gone = True
        if not self.gone and time.monotonic() - self._asked >= ASK_S - EVERY_S / 2:
            self._asked = time.monotonic()
            ref = self.process.actor.pulse.options(concurrency_group=GROUP, enable_task_events=False).remote()  # no history
            self._call = asyncio.wrap_future(ref.future())

    def _heard(self, pulse: Pulse) -> None:
        before, self.pulse, self.answered = self.pulse, pulse, time.monotonic()
        if self.state is None:
            return
        name = self.state()
        if self._stage is None or self._stage.name != name:
            if self._stage is not None:
                self._stages.leave(self._stage)
            self._stage = self._stages.enter(name)
        elif before is None or before.beats != pulse.beats:
            self._stage.beat()

    def forgive(self) -> None:
        """Count what is silent from now on."""
        self.answered = time.monotonic()
        self._stages.beat()

    def seen(self) -> list[Seen]:
        """What is known of it and its processes; the system has not looked yet."""
        name, pulse = self.process.name, self.pulse
        unanswered = max(0.0, time.monotonic() - self.answered)
        if pulse is None:
            return [Seen(name, name, rank=self.rank, unanswered_s=unanswered)]
        # a server's stages are kept here, and go on while it does not answer
        stages = pulse.stages if self.state is None else self._stages.now()
        own = Seen(name, name, pulse.pid, self.rank, stages, unanswered if self.state is None else 0.0)
        return [own, *(Seen(f"{name}: {part}", name, pid) for part, pid in pulse.processes)]

    def places(self) -> dict[Place, int]:
        """Where its processes are, each with its working thread."""
        if self.pulse is None:
            return {}
        thread = max(self.pulse.stages, key=lambda each: each.silent_s).native_thread if self.pulse.stages else 0
        node = self.pulse.node
        return {(node, self.pulse.pid): thread} | {(node, pid): 0 for _, pid in self.pulse.processes}

    def close(self) -> None:
        """Ask no more."""
        self.gone = True
        if self._call is not None:
            self._call.cancel()


class Watchdog:
    """Watches the processes that are added, as long as `run` runs. Belongs to the driver's event loop.

    `stages`, `depths`: the driver's own, for reports.
    """

    def __init__(
        self,
        config: WatchConfig,
        node: str,
        run_dir: Path,
        emit: Emit,
        *,
        stages: Stages,
        depths: Depths,
        lag: Callable[[], float],
    ) -> None:
        self._patience = Patience(config.floor_s, config.first_s)
        self._stopped_s = config.stopped_s
        self._node, self._run_dir, self._emit = node, run_dir, emit
        self._stages, self._depths, self._lag = stages, depths, lag
        self._witnesses = Witnesses(node)
        self._watched: list[Watched] = []
        self._others: dict[str, int] = {}
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._quiet_until = self._judge_from = 0.0
        self._task: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Watch from now on, until `close`."""
        self._task = asyncio.ensure_future(self._run())

    def add(self, watched: Iterable[Watched]) -> None:
        """Watch these processes from now on."""
        self._watched.extend(watched)

    def watch_ranks(self, ranks: Iterable[Process]) -> None:
        """Watch these ranks of the trainer, in the place of those before them; what was found of those is dealt with."""
        self.remove([each for each in self._watched if each.rank is not None])
        if self._failed.done():
            self._failed = asyncio.get_running_loop().create_future()
        self.add(Watched(process, rank) for rank, process in enumerate(ranks))

    def add_others(self, processes: Mapping[str, int]) -> None:
        """Watch processes of this node that cannot be asked: only whether they are stopped."""
        self._others |= processes

    def remove(self, watched: Iterable[Watched]) -> None:
        """Watch these no more, as they are about to end."""
        for each in watched:
            each.close()
            with contextlib.suppress(ValueError):
                self._watched.remove(each)

    def memory(self) -> dict[str, int]:
        """Resident bytes of the processes that have told it, as their last answer had it."""
        return {each.process.name: each.pulse.memory for each in self._watched if each.pulse is not None and each.pulse.memory}

    @property
    def watched(self) -> tuple[Watched, ...]:
        """Returns the processes that can be asked."""
        return tuple(self._watched)

    async def failed(self) -> None:
        """Raises TrainerLost when a rank of the trainer hangs. Does not return while the watch goes on."""
        ends = [self._failed] if self._task is None else [self._failed, self._task]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()

    async def _run(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(max(EVERY_S, len(self._watched) / AT_MOST_A_SECOND))
            now = time.monotonic()
            if now - last > EVERY_S + OVERSLEPT_S:
                self._forgive()
            last = now
            await self._round()
            last = max(last, time.monotonic() - EVERY_S)  # looking at other nodes, or writing a report, is not sleep

    def close(self) -> None:
        """Ask nobody any more."""
        if self._task is not None:
            self._task.cancel()
        self.remove(list(self._watched))
        self._witnesses.close()
        if not self._failed.done():
            self._failed.cancel()

    def _forgive(self) -> None:
        self._witnesses.forget()
        for each in self._watched:
            each.forgive()

    async def _round(self) -> None:
        for each in self._watched:
            each.ask()
        watched = [each for each in self._watched if not each.gone]
        seen = await self._look(watched)
        halted, now = stopped(seen, self._stopped_s), time.monotonic()
        if self._failed.done() or not (halted or (late(seen, self._patience) and now >= self._judge_from)):
            return
        evidence = await self._evidence(watched, seen)
        told = [_with_evidence(each, evidence.get(each.name)) for each in seen]
        verdict = judge(told, self._patience, self._stopped_s)
        if verdict is None:
            return
        if not verdict.acts:  # who is slow now may be found to hang in a moment
            self._judge_from = now + JUDGE_S
            if now < self._quiet_until:
                return
        await self._handle(verdict, watched, told, evidence)

    async def _look(self, watched: list[Watched]) -> list[Seen]:
        places: dict[Place, int] = {(self._node, pid): 0 for pid in self._others.values()}
        for each in watched:
            places |= each.places()
        conditions = await self._witnesses.look(places)
        found = [Seen(name, name, pid, condition=conditions.get((self._node, pid))) for name, pid in self._others.items()]
        for each in watched:
            node = self._node if each.pulse is None else each.pulse.node
            for one in each.seen():
                condition = None if one.pid is None else conditions.get((node, one.pid))
                found.append(replace(one, condition=condition))
        return found

    async def _evidence(self, watched: list[Watched], seen: list[Seen]) -> dict[str, Evidence]:
        """What the ranks that answer say of themselves, within a bounded time."""
        silent = {each.name for each in seen if each.unanswered_s > SILENT_S}
        asked = [each for each in watched if each.rank is not None and each.process.name not in silent and each.pulse is not None]
        calls = {
            each.process.name: asyncio.wrap_future(each.process.actor.evidence.options(concurrency_group=GROUP).remote().future())
            for each in asked
        }
        if calls:
            await asyncio.wait(calls.values(), timeout=EVIDENCE_S)
        found = {}
        for name, call in calls.items():
            if call.done() and not call.cancelled() and call.exception() is None:
                found[name] = call.result()
            call.cancel()
        return found

    async def _handle(self, verdict: Verdict, watched: list[Watched], seen: list[Seen], evidence: dict[str, Evidence]) -> None:
        path = next_report(self._run_dir)
        if not verdict.acts:
            self._quiet_until = time.monotonic() + AGAIN_S
        with contextlib.suppress(StorageError):  # the disk may be what hangs
            still = max((_still(each) for each in seen if each.name in verdict.culprits and each.rank is not None), default=0.0)
            self._emit(StallFound(verdict.kind, verdict.culprits, verdict.sentence, str(path), verdict.acts, still))
        stacks = await self._stacks(watched, seen, evidence)
        scene = Scene(
            seen,
            self._patience,
            evidence,
            stacks,
            self._stages.now(),
            self._lag(),
            self._depths.now(),
            {each.process.name: each.state() for each in watched if each.state is not None},
            _action(verdict, watched),
        )
        with contextlib.suppress(StorageError, TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(write_report, path, verdict, scene), EVIDENCE_S)
        if verdict.acts:
            await self._act(verdict, watched, seen, path)

    async def _stacks(self, watched: list[Watched], seen: list[Seen], evidence: dict[str, Evidence]) -> dict[str, str]:
        """The stacks of all processes that have not shown their own."""
        logs = {each.process.name: str(each.process.log_path) for each in watched}
        nodes = {each.process.name: self._node if each.pulse is None else each.pulse.node for each in watched}
        asked = {
            (nodes[each.owner], each.pid): (each.name, logs[each.owner] if each.name == each.owner else "")
            for each in seen
            if each.pid is not None and each.name not in evidence and each.owner in nodes
        }
        found = await self._witnesses.stacks({place: log for place, (_, log) in asked.items()})
        return {asked[place][0]: text for place, text in found.items()}

    async def _act(self, verdict: Verdict, watched: list[Watched], seen: list[Seen], report: Path) -> None:
        words = f"{verdict.sentence}\nreport: {report}"
        by_owner = {each.process.name: each for each in watched}
        ranks = [owner for owner in verdict.owners if owner in by_owner and by_owner[owner].hung is None]
        if ranks and not self._failed.done():  # first: whoever waits for the work learns this, and not that it was killed
            self._failed.set_exception(TrainerLost(words))
            self._failed.exception()  # it is seen; `failed` raises it where somebody waits
        for each in seen:
            own = by_owner.get(each.owner)
            # of a server only its actor, without which nobody ends the rest in order
            if (
                each.name in verdict.culprits
                and each.pid is not None
                and (own is None or own.hung is None or each.name == each.owner)
            ):
                node = self._node if own is None or own.pulse is None else own.pulse.node
                await self._witnesses.kill((node, each.pid))
        for owner in verdict.owners:
            if owner in by_owner and (hung := by_owner[owner].hung) is not None:
                hung(words)
                by_owner[owner].close()


def _still(seen: Seen) -> float:
    """For how many seconds a process has come to nothing."""
    condition = seen.condition
    return condition.since_s if condition is not None and condition.state in STOPPED else seen.silent_s


def _with_evidence(seen: Seen, evidence: Evidence | None) -> Seen:
    return seen if evidence is None else replace(seen, collectives=evidence.collectives, place=evidence.place)


def _action(verdict: Verdict, watched: list[Watched]) -> str:
    if not verdict.acts:
        return "Nothing is done about it."
    keys = {each.process.name: each.restarts for each in watched if each.hung is not None}
    if set(verdict.owners) <= keys.keys():
        allowing = " and ".join(sorted({keys[owner] for owner in verdict.owners}))
        return f"The server is given up, and started again while {allowing} allows it."
    return "The process is ended."
