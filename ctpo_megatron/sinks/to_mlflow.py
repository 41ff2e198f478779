"""MLflow."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from ctpo_megatron.sinks.worker import Happened

AT_A_TIME = 1000  # metrics of a batch that MLflow takes; of parameters 100
LONGEST = 500  # characters of a parameter
STATUS = {"done": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}  # all else is KILLED


class Sink:
    """A run of the experiment, whose settings are its parameters. MLflow names runs itself.

    Events are a text among its artifacts, a line for each, which is written anew when some have come: MLflow has no other place
    for them. Each process of a run begins a text of its own. Where the store of artifacts is out of reach, events are left out,
    and numbers still get through.
    """

    def __init__(self, settings: dict[str, Any], run: dict[str, Any], name: str, *, resumed: bool, metrics: Any) -> None:
        uri = settings["uri"] or (Path(run["dir"]) / "mlruns").as_uri()
        if uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow 3.7 and newer refuse files without it
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._events, self._text, self._written = time.strftime("events/%Y-%m-%dT%H-%M-%SZ.txt", time.gmtime()), "", 0
        self._out_of_reach = False
        self._client: Any = importlib.import_module("mlflow.tracking").MlflowClient(uri)
        if resumed:
            self.id = name
            self._client.update_run(name, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(settings["experiment"])
        experiment = self._client.create_experiment(settings["experiment"]) if found is None else found.experiment_id
        self.id = self._client.create_run(experiment, run_name=run["name"]).info.run_id
        params = [self._entities.Param(key, str(value)[:LONGEST]) for key, value in run["settings"].items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self.id, params=params[first : first + 100])

    def step(self, step: int, at: float, samples: float | None, metrics: dict[str, float]) -> None:
        """See `worker.Sink`."""
        found = [self._entities.Metric(name, value, int(1000 * at), step) for name, value in metrics.items()]
        for first in range(0, len(found), AT_A_TIME):
            self._client.log_batch(self.id, metrics=found[first : first + AT_A_TIME])

    def phase(self, name: str, step: int, began: float, seconds: float) -> None:
        """See `worker.Sink`."""

    def event(self, happened: Happened) -> None:
        """See `worker.Sink`."""
        self._text += f"{happened.when}  {happened.name}: {happened.sentence}\n"

    def flush(self) -> None:
        """See `worker.Sink`."""
        if len(self._text) <= self._written or self._out_of_reach:
            return
        try:
            self._client.log_text(self.id, self._text, self._events)
        except Exception as error:  # noqa: BLE001 - as many kinds as there are stores
            self._out_of_reach = True
            print(f"events are not told, as the run's artifacts cannot be written: {error!r}", file=sys.stderr, flush=True)
        self._written = len(self._text)

    def close(self, *, how: str) -> None:
        """See `worker.Sink`."""
        self._client.set_terminated(self.id, STATUS.get(how, "KILLED"))
