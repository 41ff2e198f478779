"""What each trainer rank and each server did in steps: the phases of its kind, less the time for which it waited by itself.

A run records that time as a share, not when it was. So a rank that waited for others in an update is drawn as if it had waited at
the update's end, and a server that had nothing to work on as if at the end of the rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from ctpo_megatron.report.figures.times import BUBBLE, Span
from ctpo_megatron.report.reading.metrics import Metrics

TRAINER, SERVERS = "trainer ranks", "servers"
# of each kind: what its processes are called, and the metric that each of them has
OF_KIND = {
    TRAINER: ("trainer rank", r"train/waits/rank_(\d+)"),
    SERVERS: ("server", r"servers/busy/server_(\d+)"),
}
SAMPLING = ("rollout", "rollout tail")
MOST = 8  # processes of a kind that are drawn: those that wait most and least
RECENT = 1000  # steps over which shares are counted


def of_each(metrics: Metrics, spans: Sequence[Span]) -> dict[str, list[Span]]:
    """Returns the spans of each process that has a measure of its own, from the `spans` of the kinds."""
    found: dict[str, list[Span]] = {}
    for kind, (word, pattern) in OF_KIND.items():
        steps = [(step, list(those)) for step, those in groupby((s for s in spans if s.process == kind), lambda each: each.step)]
        for metric, number in metrics.names(pattern):
            own = [
                span
                for step, those in steps
                for span in _own(kind, f"{word} {number}", those, metrics.rows.get(step, {}).get(metric))
            ]
            if own:
                found[f"{word} {number}"] = own
    return found


def shares(processes: dict[str, list[Span]]) -> dict[str, float]:
    """Returns the share of its steps' time for which each process waited."""
    return {name: _waited(spans) / whole for name, spans in processes.items() if (whole := sum(s.end - s.begin for s in spans))}


def chosen(waits: dict[str, float]) -> list[str]:
    """Returns the processes that are drawn, in their order: of each kind all, or those that wait most and least."""
    found = list[str]()
    for word, _ in OF_KIND.values():
        names = [name for name in waits if name.startswith(f"{word} ")]
        by_share = sorted(names, key=lambda name: waits[name])
        outer = names if len(names) <= MOST else by_share[: MOST // 2] + by_share[-MOST // 2 :]
        found += [name for name in names if name in outer]
    return found


def _own(kind: str, name: str, spans: list[Span], share: float | None) -> Iterator[Span]:
    """Yields what one process did in a step, in which its kind did `spans`; where nothing is known, what its kind did."""
    if share is None:
        yield from (Span(name, each.doing, each.begin, each.end, each.step) for each in spans)
        return
    share = min(max(share, 0.0), 1.0)
    published = max((each.end for each in spans if each.doing == "publish"), default=max(each.end for each in spans))
    left = share * (published - spans[0].begin)  # seconds in which a server had work
    for each in spans:
        works = each.end - each.begin
        if kind == TRAINER and each.doing == "train":
            works *= 1 - share
        elif kind == SERVERS and each.doing in SAMPLING and each.end <= published:
            works = min(works, left)
            left -= works
        at = each.begin + works
        if at > each.begin:
            yield Span(name, each.doing, each.begin, at, each.step)
        if each.end > at:
            yield Span(name, BUBBLE, at, each.end, each.step)


def _waited(spans: list[Span]) -> float:
    return sum(each.end - each.begin for each in spans if each.doing == BUBBLE)
