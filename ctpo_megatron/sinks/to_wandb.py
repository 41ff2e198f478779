"""Weights & Biases."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


class Sink:
    """A run of the project, with the axes `step` and `samples`. Its own counter of rows never goes back, and rows that are not
    above it are dropped; so it is the time in milliseconds, which goes on over a resume also where no server says how far it was.

    A run that goes back to a checkpoint shows what was lost besides, as nothing can be taken back there.
    """

    def __init__(self, settings: dict[str, Any], run: dict[str, Any], name: str, *, resumed: bool, metrics: Any) -> None:
        self.id = name
        wandb: Any = importlib.import_module("wandb")
        key = settings["key_file"] and Path(settings["key_file"]).expanduser().read_text(encoding="utf-8").strip()
        options = {"console": "off", "silent": True, "x_disable_stats": True} | ({"api_key": key} if key else {})
        self._run = wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            group=settings["group"],
            name=run["name"],
            id=name,
            resume="allow",
            mode=settings["mode"],
            dir=run["dir"],
            config=run["settings"],
            settings=wandb.Settings(**options),
        )
        self._row = 0
        for axis in ("step", "samples"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="step")

    def step(self, step: int, at: float, samples: float | None, metrics: dict[str, float]) -> None:
        """See `worker.Sink`."""
        self._row = max(self._row + 1, int(1000 * at))
        axes = {"step": step, "time": at} | ({} if samples is None else {"samples": samples})
        self._run.log(axes | metrics, step=self._row)

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """See `worker.Sink`."""

    def close(self, *, ended: bool) -> None:
        """See `worker.Sink`."""
        self._run.finish(exit_code=0 if ended else 1)
