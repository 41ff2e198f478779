"""Writes the table of docs/alarms.md: how soon alarms come on made runs with a known fault, and how often without one.

.venv/bin/python tools/alarms_table.py [--seeds 10] [--healthy 100]
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from made_runs import ANSWERS, FAULTS, GROUPS, faulty, healthy

from ctpo_megatron.config.alarms import AlarmsConfig
from ctpo_megatron.record.alarm_events import AlarmRaised
from ctpo_megatron.record.alarms.kinds import Measure
from ctpo_megatron.record.alarms.watch import Alarms

PAGE = Path(__file__).resolve().parent.parent / "docs" / "alarms.md"
FIRST_SEED = 201  # thresholds were chosen looking at seeds before
BEGIN, END = "<!-- table: made runs -->", "<!-- end -->"


MEASURE = Measure(GROUPS, ANSWERS, "reward/term/answer")


def raised_in(rows: list[dict[str, float]], config: AlarmsConfig, measure: Measure = MEASURE) -> list[AlarmRaised]:
    """Returns the alarms of a run, in order."""
    alarms = Alarms(config, measure)
    return [each for row in rows for each in alarms.row(row) if isinstance(each, AlarmRaised)]


def table(seeds: int, healthy_seeds: int, config: AlarmsConfig) -> list[str]:
    """Returns the lines of the table, and of what healthy runs raised."""
    lines = ["| alarm | fault | harm | steps to the alarm | steps to the harm | before harm | others raised |"]
    lines.append("|---|---|---|---|---|---|---|")
    early = 0
    for fault in FAULTS:
        delays, harms, in_time, others = [], [], 0, Counter[str]()
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            made = faulty(fault, seed)
            raised = raised_in(made.rows, config)
            if made.begin is None or made.harm is None:
                raise ValueError(f"{fault.alarm}, seed {seed}: there is no harm")
            early += sum(each.step < made.begin for each in raised)
            first = next((each.step for each in raised if each.alarm == fault.alarm and each.step >= made.begin), None)
            harms.append(made.harm - made.begin)
            others.update({each.alarm for each in raised} - {fault.alarm})
            if first is not None:
                delays.append(first - made.begin)
                in_time += first < made.harm
        beside = ", ".join(f"{name} {count}" for name, count in sorted(others.items()))
        words = [fault.alarm, fault.story, fault.harm_words, _range(delays), _range(harms), f"{in_time} of {seeds}", beside]
        lines.append(f"| {' | '.join(words)} |")
    by_seed = [raised_in(healthy(seed).rows, config) for seed in range(FIRST_SEED, FIRST_SEED + healthy_seeds)]
    ten, all_ = (words_of(found) for found in (by_seed[:seeds], by_seed))
    lines += ["", f"False alarms on {seeds} healthy runs of 600 steps: {ten}; on {healthy_seeds} such runs: {all_}."]
    lines += [f"Before the fault began, in the {seeds * len(FAULTS)} runs above: {early or 'none'}."]
    return lines


def cost(config: AlarmsConfig) -> float:
    """Returns seconds of CPU that a row costs all detectors, in the median of five runs."""
    rows, found = healthy(1).rows, []
    for _ in range(5):
        begun = time.process_time()
        raised_in(rows, config)
        found.append((time.process_time() - begun) / len(rows))
    return statistics.median(found)


def main(
    seeds: Annotated[int, typer.Option(help="of each fault, and healthy ones")] = 10,
    healthy_seeds: Annotated[int, typer.Option("--healthy", help="healthy ones in all")] = 100,
) -> None:
    """Make the runs, and put the table into the page."""
    config = AlarmsConfig()
    lines = [
        *table(seeds, healthy_seeds, config),
        "",
        f"All detectors together take {cost(config) * 1e3:.2f} ms of CPU for a row.",
    ]
    print("\n".join(lines))
    put(PAGE, BEGIN, END, lines)


def put(page: Path, begin: str, end: str, lines: list[str]) -> None:
    """Put `lines` between the lines `begin` and `end` of `page`."""
    text = page.read_text(encoding="utf-8")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}", encoding="utf-8")


def words_of(found: list[list[AlarmRaised]]) -> str:
    """Returns the alarms of some runs, with their steps."""
    return ", ".join(f"{each.alarm} at step {each.step}" for one in found for each in one) or "none"


def _range(values: list[int]) -> str:
    if not values:
        return "never"
    return f"{min(values)} to {max(values)}, median {statistics.median(values):.0f}"


if __name__ == "__main__":
    typer.run(main)
