"""Which inference servers may be asked, and with which version of the weights each one answers.

                    lose (restarts left)
        +----------------------------------------------+
        v                                              |
    STARTING --join--> JOINING --+                     |
                                 |                     |
                  +--------------+--> UPDATING --serve--> SERVING
                  |                    ^  |                 |
                  |             update |  | suspend         | suspend
                  |                    |  v                 |
                  +---------------- SUSPENDED <-------------+           lose (none left): GONE, from every state

`offload` makes every server that is up SLEEPING, `update` ends it. While servers sleep, none that was lost is started again.

A server that is set aside keeps its weights for an evaluation: no publication goes to it, and only requests that ask for such a
server. One that fails then is not aside any more, as its weights are lost.

Requests go to SERVING servers only. A token counts when the version that it carries was proven on its server (`serve`), and is
not older than what the server had been given when the request began. Only a trainer that goes back to a checkpoint makes versions
older; then none is proven any more that is newer.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from ctpo_megatron.engine.busy import BusyTimes
from ctpo_megatron.engine.choice import Place, choose
from ctpo_megatron.engine.load import Load
from ctpo_megatron.errors import AsideLost, EngineError, NoServerLeft
from ctpo_megatron.record.events import Emit, ServerLost, ServerRestarted, ServerServing, ServerSuspended, discard


class State(enum.StrEnum):
    """What a server may be used for."""

    STARTING = "starting"  # its process is being started again
    JOINING = "joining"  # it answers; what weights it holds is not proven
    UPDATING = "updating"  # a publication is under way
    SERVING = "serving"
    SLEEPING = "sleeping"  # it gives back its memory, until the next publication
    SUSPENDED = "suspended"  # it failed; a publication tries it again
    GONE = "gone"  # for good


UP = (State.JOINING, State.UPDATING, State.SERVING, State.SLEEPING, State.SUSPENDED)

Memory = Literal["weights", "kv_cache", "cuda_graph"]  # kinds of a server's memory that it can give back; SGLang's words
MEMORY: frozenset[Memory] = frozenset(("weights", "kv_cache", "cuda_graph"))


@dataclass(eq=False, slots=True)
class Member:
    """One server from its start to its end; one that is started again is a new member."""

    name: str
    url: str
    tp: int = 1
    state: State = State.JOINING
    version: int | None = None  # of the weights it was given last; None: not known
    proven: set[int] = field(default_factory=set)  # versions that it has served, since the last that went back
    returns: int = 0  # how often it was given an older version, because the trainer went back to a checkpoint
    reason: str = ""  # why it does not serve
    aside: bool = False  # whether it is kept out of publications
    failures: int = 0
    next_failure: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: int = 0  # requests at it
    limit: int | None = None  # of these; None: no bound
    load: Load | None = None  # by its own account, when it was last asked
    given_back: frozenset[Memory] = frozenset()  # what it was told to give back, and not yet to take again

    @property
    def gone(self) -> bool:
        """Returns whether it does not come back."""
        return self.state is State.GONE

    def fail(self) -> None:
        """Count a failure, and wake whoever waits for it."""
        self.failures += 1
        failed, self.next_failure = self.next_failure, asyncio.Event()
        failed.set()


@dataclass(frozen=True, slots=True)
class Lease:
    """The server for one request, the version it had when the request began, and how often it had failed and returned by then."""

    member: Member
    version: int
    failures: int
    returns: int = 0

    @property
    def oldest(self) -> int:
        """Returns the oldest version that a token of the answer may carry."""
        return self.version if self.member.returns == self.returns else 0

    @property
    def broken(self) -> bool:
        """Returns whether the server has failed since: nothing that it says to this request is used."""
        return self.member.failures != self.failures


class Fleet:
    """The servers of a run; belongs to one event loop.

    `patience_s`: how long a request may wait for a server. `restarts`: how often each one is started again. `fixed_version`: the
    version of weights that never change, where there is no trainer: a server that joins serves at once, and one that fails is
    started again. `emit` receives an event whenever a server is lost, suspended, back, or serves again. `setting`: what
    `restarts` is called.
    """

    def __init__(
        self,
        *,
        patience_s: float,
        restarts: int = 0,
        fixed_version: int | None = None,
        emit: Emit = discard,
        setting: str = "rollout.engine.restarts",
    ) -> None:
        self._patience_s, self._setting = patience_s, setting
        self._restarts = restarts
        self._fixed_version = fixed_version
        self._emit = emit
        self._members: dict[str, Member] = {}
        self._lost: dict[str, int] = {}
        self._rejoined = 0
        self._offloaded = False
        self._held = False
        self.traffic: Callable[[], dict[str, float]] | None = None  # what is measured of the requests
        self.busy = BusyTimes()
        self._changed = asyncio.Event()
        self._freed = asyncio.Event()

    def join(self, name: str, url: str, tp: int = 1) -> Member:
        """Returns the new member: a server called `name` answers at `url`, perhaps in place of one that was lost."""
        member = Member(name, url, tp)
        self._members[name] = member
        self._rejoined += name in self._lost
        if name in self._lost:
            member.reason = "it was started again and does not hold the current weights yet"
            self._emit(ServerRestarted(name, url))
        if self._fixed_version is not None:
            self.serve([member], self._fixed_version)
        self._notify()
        return member

    def update(self, members: Iterable[Member]) -> None:
        """Note that a publication to `members` begins: no new request goes to them."""
        for member in members:
            member.state = State.UPDATING
        self._notify()

    def offload(self) -> list[Member]:
        """Returns the servers that are up, which give their memory to the trainer until `awake`; no request goes to them now."""
        self._offloaded = True
        members = self.members(*UP)
        for member in members:
            member.state = State.SLEEPING
        self._notify()
        return members

    def awake(self) -> None:
        """Allow servers to be started again: the trainer needs their memory no more."""
        self._offloaded = False
        self._notify()

    def hold(self) -> None:
        """Let requests wait until `release`."""
        self._held = True

    def release(self) -> None:
        """Let requests go to servers again."""
        self._held = False
        self._notify()

    def set_aside(self, count: int) -> int:
        """Keep the last `count` servers that serve out of publications, fewer where none would be left; returns how many."""
        serving = [member for member in self.members(State.SERVING) if not member.aside]
        chosen = serving[max(1, len(serving) - count) :]
        for member in chosen:
            member.aside = True
        self._notify()
        return len(chosen)

    def give_back(self) -> None:
        """Let the servers that are set aside take part in publications again; those with old weights serve after the next."""
        newest = max((each.version or 0 for each in self.members(State.SERVING) if not each.aside), default=None)
        for member in self.members(State.SERVING):
            if member.aside and member.version != newest:
                member.state, member.reason = State.JOINING, f"it kept version {member.version} of the weights for an evaluation"
            member.aside = False
        self._notify()

    def publishable(self, *states: State) -> list[Member]:
        """Returns the servers in one of `states` that a publication may go to."""
        return [member for member in self.members(*states) if not member.aside]

    async def memory_free(self) -> None:
        """Return when there is memory for a server to start with."""
        await self._until(lambda: not self._offloaded)

    def serve(self, members: Iterable[Member], version: int) -> None:
        """Let requests go to `members`, which are proven to hold `version`."""
        for member in members:
            if member.reason:
                self._emit(ServerServing(member.name, version))
            if member.proven and version < max(member.proven):
                member.proven, member.returns = set(), member.returns + 1
            member.state, member.version, member.reason = State.SERVING, version, ""
            member.proven.add(version)
        self._notify()

    def suspend(self, member: Member, reason: str) -> None:
        """Send nothing to `member` before a publication to it has succeeded; what it is doing for a request is dropped."""
        if member.state not in UP:
            return
        if self._fixed_version is not None:
            self.lose(member, reason)
            return
        if member.state is not State.SUSPENDED:
            self._emit(ServerSuspended(member.name, reason))
        member.state, member.version, member.reason = State.SUSPENDED, None, reason
        member.aside = False
        member.fail()
        self._notify()

    def lose(self, member: Member, reason: str) -> None:
        """Give up `member`, which has died or failed once too often; its process is to end, and starts again if it may."""
        if member.state is State.GONE or self._members.get(member.name) is not member:
            return
        deaths = self._lost[member.name] = self._lost.get(member.name, 0) + 1
        again = deaths <= self._restarts
        member.state, member.version = State.STARTING if again else State.GONE, None
        member.aside = False
        member.fail()
        ending = f"starting it again, {deaths} of {self._restarts}" if again else f"{self._setting} = {self._restarts}"
        member.reason = f"{reason}\n({ending})"
        self._emit(ServerLost(member.name, member.reason, again))
        self._notify()

    def members(self, *states: State) -> list[Member]:
        """Returns the servers in one of `states`, in the order in which their names first came."""
        return [member for member in self._members.values() if member.state in states]

    @property
    def hopeless(self) -> bool:
        """Returns whether every server is gone for good."""
        return all(member.gone for member in self._members.values())

    def report(self) -> str:
        """Returns a line for every server that does not serve."""
        return "\n".join(
            f"{member.name} ({member.url}) is {member.state}" + (f": {member.reason}" if member.reason else "")
            for member in self._members.values()
            if member.state is not State.SERVING
        )

    def metrics(self) -> dict[str, float]:
        """Returns how many servers serve, are set aside, were lost and came back, and what is measured of requests."""
        counts = {"serving": len(self.publishable(State.SERVING)), "aside": sum(each.aside for each in self._members.values())}
        counts |= {"lost": sum(self._lost.values()), "rejoined": self._rejoined}
        traffic = {} if self.traffic is None else self.traffic()
        return {f"servers/{name}": float(count) for name, count in counts.items()} | traffic

    async def acquire(self, session: int, left: Member | None = None, *, aside: bool = False) -> Lease:
        """Returns a serving server for a request, until `done`: always the same for a session while that one serves and has room.

        `left`: where the request comes from, because that one was slow. `aside`: one that is set aside. Waits while none serves,
        and while those that do have no room: a bound holds whatever becomes of other servers. Raises NoServerLeft when none is
        left, or none has come within `patience_s`, and AsideLost when none is set aside now.
        """
        while True:
            await self._served(aside)
            member = self._chosen(session, left, aside)
            if _place(member).has_room:
                break
            await self._freed.wait()  # each request there is bounded
        if member.version is None:  # `serve` sets both
            raise EngineError(f"{member.name} serves, but no version of the weights was proven on it")
        member.in_flight += 1
        self.busy.asked(member.name)
        return Lease(member, member.version, member.failures, member.returns)

    def done(self, lease: Lease) -> None:
        """Note that the request is over."""
        lease.member.in_flight -= 1
        self.busy.answered(lease.member.name)
        self.freed()

    async def _served(self, aside: bool) -> None:
        """Return when a server serves; for one that is `aside`, when requests may go out. Raises NoServerLeft."""
        try:
            async with asyncio.timeout(self._patience_s):
                await self._until(lambda: not self._held and (aside or self._one_serves or self.hopeless))
        except TimeoutError:
            raise NoServerLeft(
                f"no inference server came into service within {self._patience_s:.0f} s:\n{self.report()}"
            ) from None
        if self.hopeless:
            raise NoServerLeft(f"no inference server is left:\n{self.report()}")

    @property
    def _one_serves(self) -> bool:
        return any(each.state is State.SERVING and not each.aside for each in self._members.values())

    def _chosen(self, session: int, left: Member | None, aside: bool) -> Member:
        """Returns the server that `choose` says. Raises AsideLost when none is set aside now.

        It says home where that will do, and is not asked then: with a thousand servers that costs a millisecond a request.
        """
        known = [each for each in self._members.values() if each.aside == aside]
        if known:
            home = known[session % len(known)]
            if home is not left and _place(home).serves and _place(home).has_room:
                return home
        places = [_place(each, left) for each in known]
        if not any(place.serves for place in places):
            raise AsideLost(f"no inference server is set aside any more:\n{self.report()}")
        return known[choose(places, session)]

    async def accept(self, lease: Lease, versions: Iterable[int]) -> bool:
        """Returns whether tokens that carry `versions` may be used. Where they may not, their server is suspended.

        Tokens of a version whose publication is under way wait for its outcome.
        """
        member, found = lease.member, set(versions)
        if not found <= member.proven:
            await self._until(lambda: member.state is not State.UPDATING or lease.broken)  # every publication is bounded
        if lease.broken:
            return False
        wrong = sorted(version for version in found if version not in member.proven or version < lease.oldest)
        if wrong:
            self.suspend(member, f"{member.url} answered with version {wrong[0]} of the weights; it was given {lease.version}")
        return not wrong

    async def broken(self, lease: Lease) -> None:
        """Return when the request need not be waited for any more.

        All requests in flight wait here, so nothing else wakes them: 2,000 would take 4 ms every time.
        """
        if not lease.broken:
            await lease.member.next_failure.wait()

    async def changed(self) -> None:
        """Return when something has happened to a server."""
        await self._changed.wait()

    async def lost(self, member: Member) -> None:
        """Return when `member` is lost."""
        await self._until(lambda: member.state not in UP)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self.freed()

    def freed(self) -> None:
        """Let requests that wait for room look for it: one has ended, or a bound has moved."""
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()


def _place(member: Member, left: Member | None = None) -> Place:
    return Place(member.state is State.SERVING, member.in_flight, member.limit, member is left)
