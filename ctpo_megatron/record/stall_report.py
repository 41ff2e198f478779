"""RUN_DIR/stalls/NNN.md: everything that was seen when a run stood still, for a person."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ctpo_megatron.errors import storing
from ctpo_megatron.record.heartbeat import Patience, Stage
from ctpo_megatron.record.stalls import SILENT_S, STARVED, Evidence, Seen, Verdict

DIRECTORY = "stalls"


@dataclass(frozen=True, slots=True)
class Scene:
    """What a report is made of besides the verdict. Stacks and evidence are by the name of the process."""

    seen: Sequence[Seen]
    patience: Patience
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)
    driver: Sequence[Stage] = ()
    loop_lag_s: float = 0.0
    depths: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)  # what servers are used for
    action: str = ""


def next_report(run_dir: Path) -> Path:
    """The file of the next report of a run."""
    directory = run_dir / DIRECTORY
    taken = [int(path.stem) for path in directory.glob("*.md") if re.fullmatch(r"\d+", path.stem)]
    return directory / f"{max(taken, default=0) + 1:03d}.md"


def write_report(path: Path, verdict: Verdict, scene: Scene) -> None:
    """Write the report of a stall. Raises StorageError."""
    with storing(path):
        path.parent.mkdir(exist_ok=True)  # never the run's own directory, which may be away
        path.write_text(render(verdict, scene), encoding="utf-8")


def render(verdict: Verdict, scene: Scene, when: str | None = None) -> str:
    """The report as Markdown."""
    parts = [
        f"# {verdict.sentence[0].upper()}{verdict.sentence[1:]}",
        f"Seen {when or time.strftime('%Y-%m-%d %H:%M:%S %Z')}; kind: {verdict.kind}. {scene.action}".strip(),
        _waits(verdict),
        _processes(scene),
        _driver(scene),
        _recent(scene.evidence),
        _stacks(verdict, scene),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _waits(verdict: Verdict) -> str:
    return "## Who waits for whom\n\n" + "\n".join(f"- {edge}" for edge in verdict.edges) if verdict.edges else ""


def _processes(scene: Scene) -> str:
    rows = [_row(each, scene) for each in scene.seen]
    head = ["| process | pid | in | silent | allowed | answers | system says |", "|---|---|---|---|---|---|---|"]
    return "## Processes\n\n" + "\n".join(head + rows)


def _row(each: Seen, scene: Scene) -> str:
    condition = each.condition
    says = "?" if condition is None else f"{condition.state} for {condition.since_s:.0f} s, {condition.cpus:.1f} processors"
    if condition is not None and condition.waited is not None and condition.waited >= STARVED:
        says += f", {condition.waited:.0%} waiting for one"
    if condition is not None and condition.place:
        says += f", in {condition.place}"
    deadlines = [scene.patience.deadline_s(stage.usual_s) for stage in each.stages]
    allowed = f"{min(deadlines):.0f} s" if deadlines else ""
    silent = f"{each.silent_s:.0f} s" if each.stages or each.unanswered_s else ""
    answers = "yes" if each.unanswered_s <= SILENT_S else f"not for {each.unanswered_s:.0f} s"
    if not each.stages and each.owner != each.name:
        answers = ""  # its owner answers for it
    doing = "; ".join(str(stage) for stage in each.stages) or scene.states.get(each.name, "")
    where = ", ".join(filter(None, (doing, each.place and f"in {each.place}")))
    return f"| {each.name} | {each.pid or ''} | {where} | {silent} | {allowed} | {answers} | {says} |"


def _driver(scene: Scene) -> str:
    lines = [
        f"- {stage} since {stage.seconds:.0f} s" + (f", waits for {stage.waits_for}" if stage.waits_for else "")
        for stage in scene.driver
    ]
    lines.append(f"- event loop: {scene.loop_lag_s * 1000:.0f} ms late")
    lines += [
        f"- waiting for {name}: {count}" + (f", the longest for {oldest:.1f} s" if count else "")
        for name, (count, oldest) in scene.depths.items()
    ]
    lines += [f"- {name} is {state}" for name, state in scene.states.items()]
    return "## Driver\n\n" + "\n".join(lines)


def _recent(evidence: Mapping[str, Evidence]) -> str:
    blocks = [f"{name}:\n\n```\n" + "\n".join(each.recent) + "\n```" for name, each in evidence.items() if each.recent]
    return "## Last collective calls\n\n" + "\n\n".join(blocks) if blocks else ""


def _stacks(verdict: Verdict, scene: Scene) -> str:
    texts = {name: each.stacks for name, each in scene.evidence.items() if each.stacks} | dict(scene.stacks)
    order = sorted(texts, key=lambda name: name not in verdict.culprits)  # whoever is to blame comes first
    return "## Stacks\n\n" + "\n\n".join(f"{name}:\n\n```\n{texts[name]}\n```" for name in order) if texts else ""
