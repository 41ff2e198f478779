"""Bad input ends at once: one message for a person, exit code 2, nothing started."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from ctpo_megatron import cli
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.checkpoints import write_checkpoint
from tests.support.refusals import refusal

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    task = make_toy_task(root, seed=1, train_rows=8, eval_rows=4, sft_rows=4)
    return {"model.path": make_toy_model(root / "model", seed=1), "data.train": task.train, "data.eval": task.eval}


@pytest.fixture(autouse=True)
def _no_nursery(monkeypatch):
    """What is refused here starts nothing that a test would wait for."""
    monkeypatch.setattr("ctpo_megatron.cli.opened_nursery", lambda _: contextlib.nullcontext())


def refused(capsys, monkeypatch, tmp_path, good, *overrides: str, command: str = "train") -> str:
    """The message of a command that ended with exit code 2 before it wrote a run directory or started Ray."""
    words = [f"{key}={value}" for key, value in good.items()]
    return refusal(monkeypatch, capsys, tmp_path / "run", command, CONFIG, *words, *overrides)


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


@pytest.fixture
def saved(good, tmp_path) -> Path:
    """A run that was saved after two steps of 3 prompts; returns its directory."""
    from ctpo_megatron.config.load import dump_config, load_config
    from ctpo_megatron.data.order import PromptSampler
    from ctpo_megatron.data.prompts import read_prompts
    from ctpo_megatron.loop.state import RunState

    run_dir = tmp_path / "earlier"
    config = load_config(CONFIG, [f"run_dir={run_dir}", *(f"{key}={value}" for key, value in good.items())])
    sampler = PromptSampler(read_prompts(good["data.train"]), config.seed)
    sampler.next(6)
    state = RunState(2, 6, sampler.state(), {0: 0.5}, samples=48)
    write_checkpoint(run_dir / "checkpoints", 2, state, resolved=dump_config(config), model=good["model.path"], optimizer_steps=8)
    return run_dir


def other_rows(good, tmp_path, change: str) -> Path:
    """A copy of the training data in which one thing is different."""
    import pyarrow.parquet as pq

    rows = pq.read_table(good["data.train"]).to_pylist()
    if change == "a row less":
        rows = rows[:-1]
    elif change == "another answer":
        rows[3]["reward_model"]["ground_truth"] = "-12345"
    elif change == "another question":
        rows[5]["prompt"][-1]["content"] += " Think."
    else:
        rows = rows[::-1]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("change", ["a row less", "another answer", "another question", "another order"])
def test_other_data_than_the_checkpoints_are_found_before_anything_starts(capsys, monkeypatch, tmp_path, good, saved, change):
    other = other_rows(good, tmp_path, change)
    message = refused(capsys, monkeypatch, tmp_path, good, f"run_dir={saved}", f"data.train={other}", "--resume")
    assert "the prompts changed since" in message
    assert f"8 prompts in the checkpoint, {7 if change == 'a row less' else 8} with other contents now" in message
    assert f"data.train: {good['data.train']} in the checkpoint, {other} now" in message
    assert "data.allow_change=true" in message
    assert (saved / "checkpoints" / "step_00000002").is_dir()  # nothing is set aside


def test_a_system_prompt_makes_other_prompts(capsys, monkeypatch, tmp_path, good, saved):
    words = (f"run_dir={saved}", "data.system_prompt=Be brief.", "data.max_prompt_tokens=128", "--resume")
    message = refused(capsys, monkeypatch, tmp_path, good, *words)
    assert "data.system_prompt: null in the checkpoint, Be brief. now: refused" in message


def test_another_model_than_the_checkpoints_is_refused_by_name(capsys, monkeypatch, tmp_path, good, saved):
    deeper = make_toy_model(tmp_path / "deeper", "qwen3_moe", seed=1)
    words = (f"run_dir={saved}", f"model.path={deeper}", "model.dtype=bfloat16", "--resume")
    message = refused(capsys, monkeypatch, tmp_path, good, *words)
    assert "config.json in model.path, family: qwen3 in the checkpoint, qwen3_moe now: refused" in message
    assert "model.dtype: float32 in the checkpoint, bfloat16 now: refused" in message
    assert "ctpo convert to-hf" in message
    told = [json.loads(line) for line in (saved / "events.jsonl").read_text().splitlines()]
    assert {"model.path": "applies", "model.dtype": "refused"}.items() <= {each["key"]: each["effect"] for each in told}.items()


def test_other_token_ids_than_the_checkpoints_are_refused(capsys, monkeypatch, tmp_path, good, saved):
    other = tmp_path / "tokenizer"
    shutil.copytree(good["model.path"], other)
    content = json.loads((other / "tokenizer.json").read_text())
    first, second, *_ = vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    message = refused(capsys, monkeypatch, tmp_path, good, f"run_dir={saved}", f"model.path={other}", "--resume")
    assert "tokenizer.json in model.path" in message
    assert "token ids mean other texts" in message


def test_a_schedule_that_cannot_end_is_found_before_anything_starts(capsys, monkeypatch, tmp_path, good, saved):
    """8 optimizer steps are made, and 2 of one optimizer step each are to come."""
    wanted = ("train.steps=4", "train.optimizer_steps=1", "optimizer.warmup_steps=11", "--resume")
    message = refused(capsys, monkeypatch, tmp_path, good, f"run_dir={saved}", *wanted)
    assert "the run has 10 optimizer steps; it needs at least 11" in message
    assert "has 3 optimizer steps" in refused(capsys, monkeypatch, tmp_path, good, *wanted[1:3], "train.steps=3")
    assert "has 4 optimizer" in refused(
        capsys, monkeypatch, tmp_path, good, "sft.steps=4", "optimizer.warmup_steps=5", "optimizer.schedule=linear", command="sft"
    )


def test_a_checkpoint_of_another_release_is_refused(capsys, monkeypatch, tmp_path, good):
    from ctpo_megatron.checkpoints.files import begin_checkpoint, commit_checkpoint

    target = tmp_path / "earlier" / "checkpoints" / "step_00000001"
    commit_checkpoint(begin_checkpoint(target, {}), target, {"version": 2, "files": {}})
    message = refused(capsys, monkeypatch, tmp_path, good, f"run_dir={tmp_path / 'earlier'}", "--resume")
    assert "format version 2; this release reads version 3" in message


def test_eval_without_a_file(capsys, monkeypatch, tmp_path, good):
    assert "data.eval" in refused(capsys, monkeypatch, tmp_path, good, "data.eval=null", command="eval")


def test_a_rank_is_for_rehearsals(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ctpo", "plan", str(CONFIG), "--rank", "1"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "give --rehearse too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        ("c", "c"),
        ("c --resume", "c --resume=newest"),
        ("c --resume auto a=b", "c --resume=auto a=b"),
        ("c --resume a=b", "c --resume=newest a=b"),
        ("--resume c auto", "--resume=newest c auto"),
        ("c --resume=auto", "c --resume=auto"),
    ],
)
def test_resume_takes_auto_and_no_override(words: str, joined: str) -> None:
    assert cli._with_mode(words.split()) == joined.split()
