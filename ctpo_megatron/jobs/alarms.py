"""`ctpo alarms`: what the alarms of a run say of what it recorded, with its own thresholds or others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import InputError
from ctpo_megatron.loop.alarms import measure_of
from ctpo_megatron.record.alarm_events import AlarmCleared, AlarmRaised
from ctpo_megatron.record.alarms.replay import replay
from ctpo_megatron.record.alarms.watch import Alarms
from ctpo_megatron.record.files import jsonable


def alarms_job(run_dir: Path, overrides: list[str], *, as_json: bool) -> None:
    """Print the alarms that the rows in `run_dir` raise and clear, also of a run that goes on; nothing is written.

    `overrides`: `alarms.NAME.KEY=value` on top of the run's own configuration. `as_json`: one object instead of a table.
    Raises InputError where there are no rows.
    """
    config_file, metrics = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    for path in (config_file, metrics):
        if not path.is_file():
            raise InputError(f"{path} is not there; give the directory of a run of `ctpo train`")
    other = [word for word in overrides if not word.startswith("alarms.")]
    if other:
        raise InputError(f"{other[0]}: only settings of `alarms` can be tried on a run that is over; allowed: alarms.KEY=value")
    config = load_config(config_file, overrides)
    alarms = Alarms(config.alarms, measure_of(config))
    told = replay(alarms, run_dir)
    if as_json:
        lines = [{"event": each.name, **asdict(each)} for each in told]
        print(json.dumps(jsonable({"run": config.name, "alarms": lines, "standing": sorted(alarms.standing)}), allow_nan=False))
        return
    console = Console()
    if told:
        console.print(_table(told))
    standing = ", ".join(alarms.standing) or "none"
    print(f"{config.name}: {sum(isinstance(each, AlarmRaised) for each in told)} alarms; standing at the end: {standing}")
    for name, raised in alarms.standing.items():
        print(f"{name}: {raised.advice}")


def _table(told: list[AlarmRaised | AlarmCleared]) -> Table:
    table = Table("step", "alarm", "", "since", "value", "limit", "where")
    for each in told:
        if isinstance(each, AlarmRaised):
            numbers = (str(each.since), f"{each.value:.4g}", f"{each.limit:.4g}")
            table.add_row(str(each.step), each.alarm, "raised", *numbers, each.where)
        else:
            table.add_row(str(each.step), each.alarm, "cleared", str(each.raised), "", "", each.where)
    return table
