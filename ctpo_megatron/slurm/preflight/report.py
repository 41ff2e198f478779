"""What a node found, as JSON, and what all nodes together mean: one table and one verdict."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "note", "bad"]
_COLOURS = {"ok": "green", "note": "yellow", "bad": "bold red"}


class Finding(BaseModel):
    """One thing that was looked at. `bad`: the run must not start; `meaning` says why and what to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    topic: str
    state: State
    found: str
    meaning: str = ""


class NodeReport(BaseModel):
    """All findings of a node, and what must be the same on all nodes: a topic's name and value."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    host: str
    findings: tuple[Finding, ...] = ()
    same: dict[str, str] = {}


class Verdict(BaseModel):
    """All nodes, in the order of the job, and one sentence."""

    nodes: tuple[NodeReport, ...]
    sentence: str

    @property
    def exit_code(self) -> int:
        """Returns 0 where the run may start, 2 where not."""
        return 2 if any(each.state == "bad" for node in self.nodes for each in node.findings) else 0


def silent(host: str, why: str) -> NodeReport:
    """Returns the report of a node that has none."""
    return NodeReport(host=host, findings=(Finding(topic="report", state="bad", found="none", meaning=why),))


def judge(nodes: list[NodeReport]) -> Verdict:
    """Returns the verdict on all nodes, after comparing what must be the same."""
    compared = tuple(_compare(nodes))
    bad: dict[str, list[str]] = {}
    for node in compared:
        for each in node.findings:
            if each.state == "bad":
                bad.setdefault(node.host, []).append(each.topic)
    if bad:
        words = "; ".join(f"{host}: {', '.join(topics)}" for host, topics in bad.items())
        return Verdict(nodes=compared, sentence=f"The run cannot start. {words}.")
    return Verdict(nodes=compared, sentence=f"All {len(nodes)} nodes can start." if len(nodes) > 1 else "The node can start.")


def as_table(verdict: Verdict) -> Table:
    """Returns a row for each topic that is the same everywhere, and for others one per node; what is wrong says what to do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("", "preflight", "node", "found", "what it means"):
        table.add_column(name, overflow="fold")
    topics = dict.fromkeys(each.topic for node in verdict.nodes for each in node.findings)
    everywhere = len(verdict.nodes)
    for topic in topics:
        found = [(node.host, each) for node in verdict.nodes for each in node.findings if each.topic == topic]
        alike = len({each for _, each in found}) == 1 and len(found) == everywhere and everywhere > 1
        for host, each in found[:1] if alike else found:
            state = f"[{_COLOURS[each.state]}]{each.state}[/]"
            table.add_row(state, topic, "all" if alike else escape(host), escape(each.found), escape(each.meaning))
    return table


def _compare(nodes: list[NodeReport]) -> list[NodeReport]:
    """Returns the nodes with a finding more for each topic that must be the same: bad on those that differ from most."""
    topics = dict.fromkeys(topic for node in nodes for topic in node.same)
    compared = list(nodes)
    for topic in topics:
        values = Counter(node.same[topic] for node in nodes if topic in node.same)
        usual, _ = values.most_common(1)[0]  # of as many, that of the first node
        for index, node in enumerate(compared):
            if topic in node.same:
                finding = _same(topic, node.same[topic], usual)
                compared[index] = node.model_copy(update={"findings": (*node.findings, finding)})
    return compared


def _same(topic: str, mine: str, usual: str) -> Finding:
    if mine == usual:
        return Finding(topic=topic, state="ok", found=_short(mine))
    differ = [f"{a} here, {b} elsewhere" for a, b in zip(mine.split(), usual.split(), strict=False) if a != b]
    return Finding(
        topic=topic, state="bad", found=_short(mine), meaning=f"must be the same on all nodes: {'; '.join(differ[:4])}"
    )


def _short(value: str) -> str:
    words = value.split()
    return value if len(words) <= 4 else f"{' '.join(words[:4])} and {len(words) - 4} more"
