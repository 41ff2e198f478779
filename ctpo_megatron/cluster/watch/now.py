"""What the processes of a run are doing, for RUN_DIR/now.json: out of what the driver knows anyway, so nobody is asked."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ctpo_megatron.cluster.watch.watchdog import Watched
from ctpo_megatron.engine.fleet import Member
from ctpo_megatron.record.heartbeat import Depths, Stages
from ctpo_megatron.record.now import Now, ProcessNow, ServerNow, doings


def look(stages: Stages, depths: Depths, lag_s: float, watched: Iterable[Watched], members: Iterable[Member]) -> Now:
    """Returns what the driver does by its `stages`, the ranks by their last pulse, and the servers by their last look."""
    waits = {name: (count, round(longest, 3)) for name, (count, longest) in depths.now().items() if count}
    ranks = tuple(_rank(each) for each in watched if each.rank is not None)
    return Now(time.time(), doings(stages.now()), round(lag_s, 4), ranks, tuple(_server(each) for each in members), waits)


def _rank(watched: Watched) -> ProcessNow:
    stages = () if watched.pulse is None else watched.pulse.stages
    return ProcessNow(watched.process.name, doings(stages), round(max(0.0, time.monotonic() - watched.answered), 3))


def _server(member: Member) -> ServerNow:
    load = member.load
    return ServerNow(
        member.name,
        str(member.state),
        member.version,
        member.in_flight,
        member.limit,
        running=None if load is None else load.running,
        waiting=None if load is None else load.waiting,
        cache_use=None if load is None else round(load.cache_use, 4),
        aside=member.aside,
        reason=member.reason,
    )
