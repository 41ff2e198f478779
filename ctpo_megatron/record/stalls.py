"""Who is to blame when a run stands still: a pure function of what was seen of its processes.

    stopped       a process of the run is stopped (SIGSTOP): found whatever it was doing
    deadlock      processes wait for one another in a circle
    collective    all members have entered a collective call, and none comes back
    hung          a process is silent past its deadline, and waits for nobody: it spins, starves, is blocked, or does not answer
    slow          a process is silent past its deadline because another one, which is not late, has not come yet

Who waits for whom is read from the collectives that each rank entered last: in a group whose members have entered `n` calls,
those that have entered fewer are waited for by the others. The chain is followed to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ctpo_megatron.record.heartbeat import Patience, Stage

Kind = Literal["stopped", "deadlock", "collective", "hung", "slow"]
STOPPED = ("stopped", "tracing-stop")
RUNNING = "running"
SILENT_S = 4.0  # since the last answer to a question that is asked every two seconds: the process does not answer
BUSY = 0.5  # processors: a process that uses more is computing
STARVED = 0.5  # of the time: a thread that waits longer than that for a processor has less than half of one


@dataclass(frozen=True, slots=True)
class Condition:
    """What the system says about a process. States are psutil's words."""

    state: str
    since_s: float  # it was seen in this state at every look
    looks: int
    cpus: float  # processors that it used since the look before
    place: str = ""  # what its working thread waits for in the kernel; empty: not known
    waited: float | None = None  # share of the time since then that its working thread waited for a processor; None: not told


@dataclass(frozen=True, slots=True)
class Collective:
    """How far a rank has come in the collective calls of one group. The last of a rank's list is the one it entered last."""

    group: str
    ranks: tuple[int, ...]
    entered: int  # calls
    operation: str
    seconds: float = 0.0  # since it entered the last one
    inside: bool = False  # the rank is in that call now
    peers: tuple[int, ...] = ()  # ranks that it waits for in a point-to-point call; empty: the call is everybody's


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a rank says of itself once something is late: too much for every pulse. `recent`: its last collective calls."""

    collectives: tuple[Collective, ...] = ()
    place: str = ""
    stacks: str = ""
    recent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of one process at the moment of a look. `owner`: the part of the run that it belongs to, often itself."""

    name: str
    owner: str
    pid: int | None = None
    rank: int | None = None
    stages: tuple[Stage, ...] = ()  # as of its last answer
    unanswered_s: float = 0.0  # since that answer; 0: it has just answered
    condition: Condition | None = None
    collectives: tuple[Collective, ...] = ()
    place: str = ""  # where its working thread is, in words

    def lateness_s(self, patience: Patience) -> float:
        """Returns by how many seconds its most overdue stage is late; negative: it is not late."""
        if not self.stages:
            return self.unanswered_s - patience.first_s
        return max(each.silent_s + self.unanswered_s - patience.deadline_s(each.usual_s) for each in self.stages)

    @property
    def silent_s(self) -> float:
        """Returns the seconds since its last sign of life."""
        return self.unanswered_s + max((each.silent_s for each in self.stages), default=0.0)

    @property
    def doing(self) -> str:
        """Returns what it was doing when it last answered, for a person."""
        if not self.stages:
            return "nothing that it was told to do"
        stage = max(self.stages, key=lambda each: each.silent_s)
        return f"{stage}" + (f", in {self.place}" if self.place else "")


@dataclass(frozen=True, slots=True)
class Edge:
    """One process waits for others in a collective call."""

    waiter: str
    waited_for: tuple[str, ...]
    group: str
    call: int
    operation: str
    seconds: float

    def __str__(self) -> str:
        call = f", call {self.call}" if self.call else ""
        return (
            f"{self.waiter} waits in {self.operation} (group {self.group}{call}) for "
            f"{_listed(self.waited_for)}, for {self.seconds:.0f} s"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is to blame: the names of processes, what is wrong with them, and who waits for whom."""

    kind: Kind
    culprits: tuple[str, ...]
    owners: tuple[str, ...]
    sentence: str
    edges: tuple[Edge, ...] = field(default=())

    @property
    def acts(self) -> bool:
        """Whether the run does something about it."""
        return self.kind != "slow"


def stopped(seen: Sequence[Seen], after_s: float) -> list[Seen]:
    """Those that are stopped, at three looks in a row at least and for `after_s` seconds: a debugger's glance is shorter."""
    return [
        each
        for each in seen
        if each.condition is not None
        and each.condition.state in STOPPED
        and each.condition.looks >= 3
        and each.condition.since_s >= after_s
    ]


def late(seen: Sequence[Seen], patience: Patience) -> list[Seen]:
    """Those that are silent past their deadline, the most overdue first."""
    found = [each for each in seen if each.lateness_s(patience) > 0]
    return sorted(found, key=lambda each: -each.lateness_s(patience))


def judge(seen: Sequence[Seen], patience: Patience, stopped_after_s: float) -> Verdict | None:
    """Returns who is to blame; None while nobody is stopped or late."""
    edges = waits(seen)
    halted = stopped(seen, stopped_after_s)
    if halted:
        return _verdict("stopped", halted, edges, " and ".join(_stopped(each) for each in halted))
    overdue = late(seen, patience)
    if not overdue:
        return None
    by_name = {each.name: each for each in seen}
    ends, circle = follow(overdue[0].name, edges)
    if circle:
        members = [by_name[name] for name in circle]
        return _verdict("deadlock", members, edges, f"{_listed(circle)} wait for one another")
    # one that does not answer says nothing of its waits; among the others the longest silence tells
    end = max((by_name[name] for name in ends), key=lambda each: (each.unanswered_s > SILENT_S, each.silent_s))
    if end.lateness_s(patience) <= 0:
        words = f"{end.name} is slow, not late: it is in {end.doing}"
        return _verdict("slow", [end], edges, words)
    together = in_same_call(end, seen)
    if together:
        call = end.collectives[-1]
        words = (
            f"{_listed([each.name for each in together])} have all entered {call.operation} (group {call.group}, call "
            f"{call.entered}) and none comes back for {end.silent_s:.0f} s: the network or a device between them"
        )
        return _verdict("collective", together, edges, words)
    return _verdict("hung", [end], edges, _hung(end, [each for each in seen if each.owner == end.name and each is not end]))


def waits(seen: Sequence[Seen]) -> tuple[Edge, ...]:
    """Who waits for whom: one edge for each rank that is in a collective call which others have not entered."""
    by_rank = {each.rank: each for each in seen if each.rank is not None}
    edges = []
    for each in by_rank.values():
        call = each.collectives[-1] if each.collectives else None
        if call is None or not call.inside:
            continue
        members = [by_rank[rank] for rank in call.peers or call.ranks if rank in by_rank and rank != each.rank]
        behind = members if call.peers else [member for member in members if _entered(member, call.group) < call.entered]
        # those that did not say how far they are, are to blame only where nobody is known to be behind
        unknown = [member for member in members if not member.collectives]
        if named := behind or unknown:
            names = tuple(member.name for member in named)
            edges.append(Edge(each.name, names, call.group, call.entered, call.operation, call.seconds))
    return tuple(edges)


def follow(start: str, edges: Sequence[Edge]) -> tuple[list[str], tuple[str, ...]]:
    """Where the chain of waits from `start` ends: those who wait for nobody; where there are none, a circle of those who wait."""
    waited_for = {edge.waiter: edge.waited_for for edge in edges}
    ends, reached, to_see = [], [start], [start]
    while to_see:
        name = to_see.pop()
        if name not in waited_for:
            ends.append(name)
        for other in waited_for.get(name, ()):
            if other not in reached:
                reached.append(other)
                to_see.append(other)
    return ends, () if ends else _circle(start, waited_for)


def in_same_call(one: Seen, seen: Sequence[Seen]) -> list[Seen]:
    """All members of the collective call that `one` is in, where each of them is in it; empty where `one` is in none."""
    call = one.collectives[-1] if one.collectives else None
    if call is None or not call.inside or call.peers or one.unanswered_s > SILENT_S:
        return []
    members = [each for each in seen if each.rank is not None and each.rank in call.ranks]
    return members if len(members) > 1 and all(_entered(each, call.group) == call.entered for each in members) else []


def _circle(start: str, waited_for: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    path = [start]
    while (follower := waited_for[path[-1]][0]) not in path:
        path.append(follower)
    return tuple(path[path.index(follower) :])


def _entered(member: Seen, group: str) -> int:
    """How many calls of `group` a rank has entered; where it says nothing of any group, that is not known and counts as all."""
    if not member.collectives:
        return 1 << 62
    return next((each.entered for each in member.collectives if each.group == group), 0)


def _verdict(kind: Kind, culprits: Sequence[Seen], edges: tuple[Edge, ...], words: str) -> Verdict:
    names = tuple(each.name for each in culprits)
    telling = [edge for edge in edges if set(edge.waited_for) & set(names)] or list(edges)
    sentence = "; ".join([words, *(str(edge) for edge in telling[:2])])
    owners = tuple(dict.fromkeys(each.owner for each in culprits))
    return Verdict(kind, names, owners, sentence, edges)


def _stopped(each: Seen) -> str:
    since = 0.0 if each.condition is None else each.condition.since_s
    heard = f"; last heard in {each.doing}" if each.stages else ""
    return f"{each.name} is stopped (SIGSTOP) for {since:.0f} s{heard}"


def _hung(each: Seen, parts: Sequence[Seen]) -> str:
    answers = "answers" if each.unanswered_s <= SILENT_S else f"has not answered for {each.unanswered_s:.0f} s"
    words = (
        f"{each.name} shows no progress for {each.silent_s:.0f} s in {each.doing}; it {answers} and {_condition(each.condition)}"
    )
    return ", and ".join([words, *(f"{part.name} {_condition(part.condition)}" for part in parts)])


def _condition(condition: Condition | None) -> str:
    if condition is None:
        return "the system does not tell what it does"
    where = f" ({condition.place})" if condition.place else ""
    if condition.state == "disk-sleep":
        return f"is blocked in the kernel, as by a disk or network that does not answer{where}"
    if condition.waited is not None and condition.waited >= STARVED:
        return (
            f"starves: it waits for a processor {condition.waited:.0%} of the time, and uses {condition.cpus:.1f} of one, as "
            "others have those of its host; whether it would spin is not known"
        )
    if condition.cpus >= BUSY:
        return f"computes on {condition.cpus:.1f} processors: it spins"
    if condition.state == RUNNING:
        others = ", or others have the processors, which this system does not tell" if condition.waited is None else ""
        return f"wants a processor and gets {condition.cpus:.1f} of one: it spins{others}"
    return f"uses no processor: it waits{where}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
