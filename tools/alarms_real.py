"""Real runs with a real fault, and the table of what alarms said of them, in docs/alarms.md.

python tools/alarms_real.py base runs/quickstart WORK     the healthy run; `make quickstart` was run before
python tools/alarms_real.py fault WORK NAME               one fault; all of them: `faults` lists their names
python tools/alarms_real.py keep WORK                     what alarms look at, into tests/data/alarms/real
python tools/alarms_real.py table                         the table, from there
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from alarms_table import PAGE, put
from faulty_runs import BASE, FAULTS, FURTHER, MEASURE, Fault, judge, keep, make_base, make_fault, read

from ctpo_megatron.config.alarms import AlarmsConfig, GoodputAlarm
from ctpo_megatron.errors import InputError
from ctpo_megatron.record.alarm_events import AlarmRaised
from ctpo_megatron.record.alarms.watch import Alarms

KEPT = PAGE.parent.parent / "tests" / "data" / "alarms" / "real"
# an evaluation after every second step takes more of the time of so small a model's steps than the default allows
SETTINGS = AlarmsConfig(goodput=GoodputAlarm(share=0.35))
BEGIN, END = "<!-- table: real runs -->", "<!-- end of real runs -->"
app = typer.Typer(add_completion=False, help=__doc__)


def found_in(fault: Fault, kept: Path = KEPT) -> tuple[list[AlarmRaised], int | None]:
    """Returns the alarms that the recorded run of a fault raises with SETTINGS, and the step of the harm."""
    lines = read(kept / "base.jsonl.gz", kept / f"{fault.name}.jsonl.gz")
    raised = judge(lines, Alarms(SETTINGS, MEASURE))
    return raised, fault.harm([line for line in lines if "event" not in line])


def table() -> list[str]:
    """Returns the lines of the table."""
    lines = [f"| fault, from step {BASE + 1} on | alarm | steps to the alarm | harm | steps to the harm | others raised |"]
    lines.append("|---|---|---|---|---|---|")
    for fault in FAULTS:
        if not (KEPT / f"{fault.name}.jsonl.gz").is_file():
            continue
        raised, at = found_in(fault)
        told = next((each.step - BASE for each in raised if each.alarm in fault.alarms), None)
        others = ", ".join(f"{each.alarm} {each.step - BASE}" for each in raised if each.alarm not in fault.alarms)
        delays = ["never" if each is None else str(each) for each in (told, None if at is None else at - BASE)]
        words = [fault.story, " or ".join(fault.alarms), delays[0] if fault.alarms else "", fault.harm_words, delays[1], others]
        lines.append(f"| {' | '.join(words)} |")
    return [*lines, "", f"Never: not within the {FURTHER} steps that each of them had."]


@app.command("base")
def base(quickstart: Path, work: Path, seed: Annotated[int, typer.Option()] = 1) -> None:
    """Make the healthy run."""
    make_base(quickstart.resolve(), work.resolve(), seed)


@app.command("faults")
def faults() -> None:
    """List the faults."""
    print("\n".join(fault.name for fault in FAULTS))


@app.command("fault")
def fault_(work: Path, name: str) -> None:
    """Make the run of one fault."""
    make_fault(next(each for each in FAULTS if each.name == name), work.resolve())


@app.command("keep")
def keep_(work: Path) -> None:
    """Keep what alarms look at."""
    KEPT.mkdir(exist_ok=True)
    keep(work / "base", KEPT / "base.jsonl.gz", 1)
    for fault in FAULTS:
        if (work / fault.name / "summary.json").is_file():
            keep(work / fault.name, KEPT / f"{fault.name}.jsonl.gz", BASE + 1)


@app.command("table")
def table_() -> None:
    """Put the table into the page."""
    lines = table()
    print("\n".join(lines))
    put(PAGE, BEGIN, END, lines)


@app.command("all")
def all_(quickstart: Path, work: Path) -> None:
    """Make all runs, keep what alarms look at, and put the table into the page; a run that fails is told of and left out."""
    base(quickstart, work)
    for each in FAULTS:
        try:
            make_fault(each, work.resolve())
        except InputError as error:
            print(error)
    keep_(work)
    table_()


if __name__ == "__main__":
    app()
