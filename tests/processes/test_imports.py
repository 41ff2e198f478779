"""What modules and commands bring along, seen in a new interpreter, where no test has imported anything yet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
HEAVY = ["torch", "ray", "megatron", "sglang", "transformers"]
LIGHT = [
    *("models.config", "models.rules", "cluster.ray_token", "config.load", "record", "doctor"),
    *("slurm.render", "slurm.site", "jobs.topology", "jobs.plan", "cli"),
]
ACTORS = ["cluster.trainer.actor", "cluster.engines.actor"]  # of which the first sets variables before it loads torch
# the modules in turn, and what heavy each of them was the first to load
IN_TURN = f"""
import importlib, json, sys
found = {{}}
for name in {LIGHT + ACTORS!r}:
    before = set(sys.modules)
    importlib.import_module("ctpo_megatron." + name)
    found[name] = sorted(set({HEAVY!r}) & (set(sys.modules) - before))
print(json.dumps(found))
"""


def test_light_modules_load_nothing_heavy() -> None:
    """What is read before Ray's token, a model or a plan is known, and what a command is that only reads; of actors, Ray."""
    done = subprocess.run([sys.executable, "-c", IN_TURN], capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout) == {name: ["ray"] if name == ACTORS[0] else [] for name in LIGHT + ACTORS}


def test_data_is_looked_at_without_what_a_run_starts(tmp_path: Path) -> None:
    task = make_toy_task(tmp_path, seed=1, train_rows=40, eval_rows=6, sft_rows=5)
    inputs = {"model.path": make_toy_model(tmp_path / "model", seed=1), "data.train": task.train, "data.eval": task.eval}
    words = [f"{key}={value}" for key, value in inputs.items()]
    code = (
        "import sys\nfrom ctpo_megatron import cli\n"
        f"sys.argv = ['ctpo', 'data', {str(CONFIG)!r}, *{words!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(sorted({'ray', 'sglang', 'megatron'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"
