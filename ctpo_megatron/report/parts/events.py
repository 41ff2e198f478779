"""What happened in a run, as a table that can be searched."""

from __future__ import annotations

from collections import Counter

from ctpo_megatron.record.events import CheckpointVerified, DataRead, EvaluationDone, StepTrained, WeightsPublished
from ctpo_megatron.record.memory_events import CopyKept
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.reading.happenings import sentence
from ctpo_megatron.report.reading.run import Run

# what comes in every step of a run where all is well; these are counted
ROUTINE = frozenset(
    {each.name for each in (StepTrained, WeightsPublished, CheckpointVerified, EvaluationDone, CopyKept, DataRead)}
)
SHOWN = 1000  # of all others, the last ones


def events(run: Run, prefix: str) -> Part:
    """Returns the table of a run's events."""
    happened = run.events
    counts = Counter(each.name for each in happened)
    telling = [each for each in happened if each.name not in ROUTINE]
    began = happened[0].time if happened else 0.0
    rows = [
        {"time": each.time, "after": each.time - began, "name": each.name, "sentence": sentence(each)}
        for each in telling[-SHOWN:]
    ]
    numbers = {"counts": dict(counts.most_common()), "events": rows}
    routine = {name: count for name, count in counts.most_common() if name in ROUTINE}
    return part("events", "Events", prefix=prefix, numbers=numbers, rows=rows, routine=routine, left_out=len(telling) - len(rows))
