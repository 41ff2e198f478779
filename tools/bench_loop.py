"""A short run, measured from outside: tokens per second, seconds per phase and peak memory, as one JSON object.

    python tools/bench_loop.py configs/quickstart.yaml train.steps=3 eval.prompts=16

Absolute times differ between machines and hours; compare the ratios within one output.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer

from ctpo_megatron.config.load import load_config
from ctpo_megatron.record.events import StepTrained

POLL_S = 0.5
FIRST_STEP = f'"event": "{StepTrained.name}"'  # in a line of events.jsonl


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value")] = None,
) -> None:
    """Run `ctpo train` into a temporary run directory and print what it took."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir, output = Path(scratch) / "run", Path(scratch) / "output"
        loaded = load_config(config, overrides or [])
        inputs = [f"model.path={loaded.model.path}", f"data.train={loaded.data.train}", f"data.eval={loaded.data.eval or 'null'}"]
        command = [sys.executable, "-m", "ctpo_megatron.cli", "train", str(config), *(overrides or []), *inputs]
        begun, first_step = time.monotonic(), None
        with output.open("w") as sink:
            run = subprocess.Popen([*command, f"run_dir={run_dir}"], stdout=sink, stderr=subprocess.STDOUT)
            peak = 0
            while run.poll() is None:
                peak = max(peak, resident_bytes(run.pid))
                if first_step is None and FIRST_STEP in read(run_dir / "events.jsonl"):
                    first_step = time.monotonic() - begun
                time.sleep(POLL_S)
        if run.returncode:
            print(output.read_text(), file=sys.stderr)
            raise typer.Exit(run.returncode)
        summary = json.loads((run_dir / "summary.json").read_text())
    keys = ("rollout_tokens_per_s", "train_tokens_per_s", "step_seconds", "eval_seconds", "steps", "mismatch_max", "wall_s")
    result = {key: summary[key] for key in keys} | {"first_step_s": first_step, "peak_memory_gib": peak / 2**30}
    print(json.dumps(result, indent=2))


def resident_bytes(pid: int) -> int:
    """Memory of a process and all below it. Shared pages count once where the kernel tells (PSS), else per process."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def read(path: Path) -> str:
    """The file's text, empty where it does not exist yet."""
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    typer.run(main)
