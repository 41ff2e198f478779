"""Bad input ends at once: one message for a person, exit code 2, nothing started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from ctpo_megatron import cli
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.checkpoints import write_checkpoint

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    task = make_toy_task(root, seed=1, train_rows=8, eval_rows=4, sft_rows=4)
    return {"model.path": make_toy_model(root / "model", seed=1), "data.train": task.train, "data.eval": task.eval}


def refused(capsys, monkeypatch, tmp_path, good, *overrides: str, command: str = "train") -> str:
    """The message of a command that ended with exit code 2 before it wrote a run directory or started Ray."""
    import ray

    words = [f"{key}={value}" for key, value in good.items()]
    monkeypatch.setattr(sys, "argv", ["ctpo", command, str(CONFIG), *words, f"run_dir={tmp_path / 'run'}", *overrides])
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = capsys.readouterr().err
    assert end.value.code == 2, message
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lrr=1", ("optimizer.lrr", "optimizer.lr")),
        ("train.steps=many", ("train.steps", "many")),
        ("algorithm.objective.type=cptpo", ("cptpo", "ctpo", "grpo")),
        ("parallel.ep=3", ("ep*etp=3", "allowed")),
        ("parallel.tp=3", ("8", "3")),
        ("train.optimizer_steps=5", ("train.optimizer_steps=5", "32")),
        ("model.path=no/such/model", ("no/such/model",)),
        ("data.train=no/such.parquet", ("no/such.parquet",)),
        ("data.max_prompt_tokens=20", ("row 0", "data.max_prompt_tokens = 20")),
        ("rollout.engine.tp=3", ("rollout.engine.tp=3",)),
    ],
)
def test_refused_with_what_is_allowed(capsys, monkeypatch, tmp_path, good, override, told):
    message = refused(capsys, monkeypatch, tmp_path, good, override)
    for words in told:
        assert words in message


def test_servers_that_could_not_be_proven(capsys, monkeypatch, tmp_path, good):
    """SGLang on CPUs would fill the narrow matrices up."""
    message = refused(capsys, monkeypatch, tmp_path, good, "rollout.engine.tp=8", "cluster.device=cpu")
    assert "SGLang on CPUs needs MLPs whose width is a multiple of 32 * tp = 256" in message


def test_model_without_weights(capsys, monkeypatch, tmp_path, good):
    broken = tmp_path / "model"
    shutil.copytree(good["model.path"], broken)
    (broken / "model.safetensors").unlink()
    assert "safetensors" in refused(capsys, monkeypatch, tmp_path, good, f"model.path={broken}")


def test_parquet_without_the_columns(capsys, monkeypatch, tmp_path, good):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompts": ["a"], "answer": ["b"]}), tmp_path / "bad.parquet")
    message = refused(capsys, monkeypatch, tmp_path, good, f"data.train={tmp_path / 'bad.parquet'}")
    assert "bad.parquet" in message
    assert "'prompt'" in message


def test_broken_line_is_named(capsys, monkeypatch, tmp_path, good):
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:30] + "\n")
    message = refused(capsys, monkeypatch, tmp_path, good, f"data.train={tmp_path / 'bad.jsonl'}")
    assert "line 2" in message


def test_resume_without_a_checkpoint(capsys, monkeypatch, tmp_path, good):
    assert "no checkpoint" in refused(capsys, monkeypatch, tmp_path, good, "--resume")


def test_checkpoints_of_two_runs_are_not_mixed(capsys, monkeypatch, tmp_path, good):
    """Pruning keeps the highest steps: those of the earlier run, in the place of the new one's."""
    earlier = tmp_path / "earlier" / "checkpoints" / "step_00000009"
    write_checkpoint(earlier.parent, 9)
    where = f"run_dir={tmp_path / 'earlier'}"
    assert "up to step_00000009" in refused(capsys, monkeypatch, tmp_path, good, where)
    assert "already has 9 of train.steps=9" in refused(capsys, monkeypatch, tmp_path, good, where, "train.steps=9", "--resume")


def test_eval_without_a_file(capsys, monkeypatch, tmp_path, good):
    assert "data.eval" in refused(capsys, monkeypatch, tmp_path, good, "data.eval=null", command="eval")


def test_a_rank_is_for_rehearsals(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ctpo", "plan", str(CONFIG), "--rank", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "give --rehearse too" in capsys.readouterr().err
