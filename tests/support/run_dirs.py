"""Small run directories with numbers that are known, for what reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

T0 = 1_800_000_000.0  # when they begin
STEP_S = 10.0
HOSTILE = '</script><img src=x onerror="window.broken=1"><script>window.broken=1</script>\'"&'


def config(**changes: Any) -> dict[str, Any]:
    """Returns a configuration as a run writes it, as far as a report looks at it. `changes`: of top-level keys."""
    return {
        "name": "made",
        "run_dir": "runs/made",
        "seed": 1,
        "model": {"path": "models/tiny"},
        "data": {"train": "data/train.parquet"},
        "parallel": {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp": 1},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 12, "prompts_per_step": 4, "staleness": 0, "optimizer_steps": 2},
        "rollout": {"group_size": 2},
        "checkpoint": {"every": 4},
        "algorithm": {
            "objective": {"type": "ctpo", "clip_low": 0.025, "clip_high": 0.05, "dual_clip": 0.05, "power": 0.5},
        },
        **changes,
    }


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    """Returns a line of metrics.jsonl: reward step/20, a spread of 0.1 √t, clipping flat at 5 %, two ranks and two servers.

    `changes` by dotted name.
    """
    line: dict[str, Any] = {"step": step, "time": T0 + 20 + STEP_S * step, "reward/mean": step / 20, "train/entropy": 1.0}
    line |= {"rollout/response_tokens": 40.0, "rollout/sampled_tokens": 30.0, "train/loss": -0.01, "time/rollout": 6.0}
    line |= {"time/train": 3.0, "time/publish": 1.0, "time/step": STEP_S, "publish/attest": 0.1, "publish/canary_gap_max": 1e-6}
    line |= {"health/log_ratio_sigma": 0.1, "health/log_ratio_growth": 0.5, "health/effective_sample_size": 0.9}
    line |= {"train/waits/rank_0": 0.1, "train/waits/rank_1": 0.3, "servers/busy/server_0": 0.6, "servers/busy/server_1": 0.3}
    for b in range(5):
        line[f"health/log_ratio_std/from_token_{2**b}"] = 0.1 * (1.5 * 2**b) ** 0.5
        line[f"health/log_ratio_fit/from_token_{2**b}"] = 0.1 * (1.5 * 2**b) ** 0.5
        line[f"drift/from_token_{2**b}"] = 1e-6
    line |= {f"health/clip_fraction/decile_{k}": 0.05 for k in range(10)}
    return line | changes


def began(number: int, at: float, *, checkpoint: str | None = None, step: int = 0, **changes: Any) -> dict[str, Any]:
    """Returns the event of an incarnation's beginning."""
    fields = {"number": number, "checkpoint": checkpoint, "step": step, "previous": None, "host": "one", "pid": 1}
    fields |= {"process": at, "allocated": at, "job": None, "restarts": None, "version": "0.1.0", "commit": "abc"}
    return {"time": at, "event": "incarnation began", **fields, "command": ["ctpo", "train"], **changes}


def step_event(step: int, at: float) -> dict[str, Any]:
    """Returns the event of a step that ended `at`: 6 s of rollout, 1 of them its tail, 3 of training, 1 of publication."""
    phases = {"rollout": 6.0, "train": 3.0, "publish": 1.0}
    return {"time": at, "event": "step", "step": step, "seconds": STEP_S, "phases": phases, "rollout_tail": 1.0}


def events(steps: int = 12) -> list[dict[str, Any]]:
    """Returns the events of one incarnation: 20 s until it is ready, `steps` steps of 10 s, then it is done."""
    found = [began(1, T0), {"time": T0 + 20, "event": "ready", "seconds": 20.0}]
    for step in range(1, steps + 1):
        end = T0 + 20 + STEP_S * step
        found += [{"time": end, "event": "published", "version": step, "servers": 2, "seconds": 1.0}, step_event(step, end)]
        if step % 4 == 0:
            found.append({"time": end, "event": "checkpoint verified", "step": step, "seconds": 1.0})
    end = T0 + 20 + STEP_S * steps
    return [*found, {"time": end, "event": "incarnation ended", "number": 1, "how": "done", "reason": "", "at": end}]


def group(step: int, number: int, reward: float, end: str = "trained", tokens: float = 40.0, **changes: Any) -> dict[str, Any]:
    """Returns a line of the ledger: a group of two attempts, both with `reward` and `tokens`."""
    attempts = [{"attempt": each, "status": "finished", "reward": reward, "tokens": tokens} for each in range(2)]
    line = {"step": step, "group": f"g{number:08d}", "prompt": str(number), "version": step - 1, "end": end, "reason": ""}
    return {**line, "reward": reward, "tokens": tokens, "attempts": attempts, **changes}


def ledger(steps: int = 12) -> list[dict[str, Any]]:
    """Returns four groups a step, two of reward 0 and two of reward step/10: their mean is step/20."""
    return [group(step, 4 * step + each, step / 10 if each < 2 else 0.0) for step in range(1, steps + 1) for each in range(4)]


def write_run(
    directory: Path,
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    told: Iterable[Mapping[str, Any]] | None = None,
    groups: Iterable[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    accuracies: Mapping[int, float] | None = None,
) -> Path:
    """Write a run directory and return it: twelve steps that are done, unless other lines are given.

    `accuracies`: by step, each with an interval of 0.1 to either side; None: 0.2 before and 0.6 after.
    """
    directory.mkdir(parents=True, exist_ok=True)
    known = {0: 0.2, 12: 0.6} if accuracies is None else accuracies
    wanted = [metrics(step) for step in range(1, 13)] if rows is None else list(rows)
    for step, value in known.items():
        name = "eval/accuracy"
        interval = {f"{name}_low/held_out": value - 0.1, f"{name}_high/held_out": value + 0.1}
        wanted.append({"step": step, "time": T0 + 15, name: value, f"{name}/held_out": value, **interval})
    _write(directory / "metrics.jsonl", wanted)
    _write(directory / "events.jsonl", events() if told is None else told)
    _write(directory / "ledger.jsonl", ledger() if groups is None else groups)
    (directory / "config.yaml").write_text(yaml.safe_dump(dict(config() if settings is None else settings)))
    (directory / "environment.json").write_text(json.dumps({"trainer": {"OMP_NUM_THREADS": {"value": "1", "why": "one each"}}}))
    return directory


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
