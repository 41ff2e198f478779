"""Weights & Biases."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ctpo_megatron.sinks.worker import Happened

COLUMNS = ("time", "event", "what happened")
ALARM = "alarm raised"  # the event that is an alert there


class Sink:
    """A run of the project, with the axes `step` and `samples`. Its own counter of rows never goes back, and rows that are not
    above it are dropped; so it is the time in milliseconds, which goes on over a resume also where no server says how far it was.

    A run that goes back to a checkpoint shows what was lost besides, as nothing can be taken back there.

    Events are rows of the table `events`; an alarm is an alert as well, which Weights & Biases mails to whom its settings say.
    """

    def __init__(self, settings: dict[str, Any], run: dict[str, Any], name: str, *, resumed: bool, metrics: Any) -> None:
        self.id = name
        self._wandb: Any = importlib.import_module("wandb")
        key = settings["key_file"] and Path(settings["key_file"]).expanduser().read_text(encoding="utf-8").strip()
        options = {"console": "off", "silent": True, "x_disable_stats": True} | ({"api_key": key} if key else {})
        self._run = self._wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            group=settings["group"],
            name=run["name"],
            id=name,
            resume="allow",
            mode=settings["mode"],
            dir=run["dir"],
            config=run["settings"],
            settings=self._wandb.Settings(**options),
        )
        self._row, self._events = 0, self._wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        self._waits: float | None = None  # when the newest row of the table happened that was not sent
        for axis in ("step", "samples"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")

    def step(self, step: int, at: float, samples: float | None, metrics: dict[str, float]) -> None:
        """See `worker.Sink`."""
        axes = {"step": step, "time": at} | ({} if samples is None else {"samples": samples})
        self._log(axes | metrics, at)

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """See `worker.Sink`."""

    def event(self, happened: Happened) -> None:
        """See `worker.Sink`."""
        self._events.add_data(happened.when, happened.name, happened.sentence)
        self._waits = happened.at
        if happened.name == ALARM:
            self._run.alert(f"alarm {happened.fields['alarm']}", happened.sentence, level="WARN")

    def flush(self) -> None:
        """See `worker.Sink`."""
        if self._waits is not None:
            self._log({"events": self._events}, self._waits)
            self._waits = None

    def close(self, *, how: str) -> None:
        """See `worker.Sink`."""
        self._run.finish(exit_code=0 if how in ("done", "stopped") else 1)

    def _log(self, row: dict[str, Any], at: float) -> None:
        self._row = max(self._row + 1, int(1000 * at))
        self._run.log(row, step=self._row)
