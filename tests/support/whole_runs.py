"""Whole runs of `ctpo train` on the toy task, and what holds of each: numbers, ids, tokens, weights; and a run's processes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.record.token_files import NOT_TRAINED, StoredTokens, token_file
from ctpo_megatron.toy.model import Kind, make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.reach import Listener, strangers
from tests.support.runs import Finished, Started

RUN_S = 300.0
AGREEMENT = 1e-4  # largest difference of a token's log-prob between trainer and engine, float32 on CPUs


def make_toy(root: Path) -> dict[str, Path]:
    """Paths of the task's files and of a drawn model of each kind, made under `root`."""
    task = make_toy_task(root / "data", seed=1, train_rows=256, eval_rows=32, sft_rows=64)
    models = {kind: make_toy_model(root / kind, kind, seed=1, init_std=0.2) for kind in get_args(Kind)}
    lines = root / "data" / "train.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in pq.read_table(task.train).to_pylist()))
    return {"train": task.train, "train.jsonl": lines, "eval": task.eval, **models}


def start(toy: dict[str, Path], config: str, run_dir: Path, *overrides: str, kind: str = "qwen3") -> Started:
    paths = (f"data.train={toy['train']}", f"data.eval={toy['eval']}", f"model.path={toy[kind]}")
    # an untrained model earns no reward: weight decay changes its weights, so that an update that never arrives shows
    change = ("optimizer.lr=0.02", "optimizer.weight_decay=1.0")
    return Started("train", config, run_dir, *paths, *change, "eval.temperature=1.0", *overrides)


def check_run(run: Finished, steps: int, passed_over: range = range(0)) -> None:
    """It ended well, its numbers are finite, and trainer and engine agreed after every sync. See `check_ids`."""
    assert run.code == 0, run.output
    rows = [row for row in run.metrics if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["train/grad_norm"] >= 0
        assert row.get("drift/max", 0.0) < AGREEMENT  # a step that trains on older tokens alone has none
    assert any("drift/max" in row for row in rows)
    for row in run.metrics:
        require_known(row.keys() - {"step", "time"})
    assert run.happened("done")[-1]["steps"] == steps
    assert run.happened("published")[-1]["version"] == steps
    assert "ready after" in run.output
    assert f"train: {steps} steps in" in run.output
    check_ids(run, steps, passed_over)
    check_tokens(run, rows)
    assert run.summary["weight_version"] == steps
    assert run.summary["mismatch_max"] < AGREEMENT


# The head of Ray's dashboard is not started for a Ray of the run's own; its port is a fixed one, which another Ray may have
SOMETIMES = ("Ray worker that waits", "Ray's dashboard head")


def check_listeners(found: list[Listener], ranks: int, parts_of_servers: int) -> None:
    """What listens in a run on one machine: on the loopback, of processes that may, and none of those is overlooked."""
    assert strangers(found) == []
    processes = Counter(owner for owner, _ in {(each.owner, each.pid) for each in found})
    for name in SOMETIMES:
        processes.pop(name, None)
    one = {"driver", "Ray's GCS", "raylet"}
    servers = {"engine actor", "SGLang's HTTP server", "SGLang's scheduler"}
    expected = dict.fromkeys(one, 1) | dict.fromkeys(servers, parts_of_servers) | {"trainer rank": ranks}
    assert processes == expected


def check_ids(run: Finished, steps: int, passed_over: range) -> None:
    """Every attempt that was trained on or evaluated has a name of its own, over all commands that the run took.

    Groups are numbered through, but for those that were `passed_over`.
    """
    names = []
    for path in sorted((run.run_dir / "rollouts").iterdir()):
        rows = run.trajectories(path.name)
        assert all(row["id"].startswith(f"{row['group']}.") for row in rows), path
        names += [row["id"] for row in rows]
    assert len(names) == len(set(names)) > 0
    trained = {row["group"] for step in range(1, steps + 1) for row in run.trajectories(f"step_{step:08d}.jsonl")}
    ends, sums = ends_of_groups(run.run_dir / "ledger.jsonl"), run.summary["ledger"]
    assert ends.keys() == {f"g{number:08d}" for number in range(len(ends))}
    assert {group for group, end in ends.items() if end == "trained"} == trained
    assert {group for group, end in ends.items() if end == "aborted"} == {f"g{number:08d}" for number in passed_over}
    assert (sums["admitted"], sums["open"], sums["unknown"]) == (len(ends), 0, 0)
    assert {end: count for end, count in sums["groups"].items() if count} == Counter(ends.values())


def check_tokens(run: Finished, rows: list[dict]) -> None:
    """What is recorded of each token is of the trajectories beside it, and adds up to the numbers of its step."""
    for row in rows:
        stored = StoredTokens(run.run_dir / "tokens" / token_file(row["step"]))
        trajectories = run.trajectories(f"step_{row['step']:08d}.jsonl")
        wrote = [[turn for turn in each["turns"] if turn["role"] == "assistant"] for each in trajectories]
        assert stored.lengths.tolist() == [sum(len(turn["token_ids"]) for turn in turns) for turns in wrote]
        whole = stored.samples(0, len(stored.lengths))
        passed = whole.fate != NOT_TRAINED  # samples without an advantage need no pass
        assert passed.any()
        assert (whole.fate[passed] > 0).mean() == pytest.approx(row["train/clip_fraction"])
        assert np.exp(whole.log_ratio[passed].astype(float).max()) == pytest.approx(row["train/ratio_max"], rel=0.05)
        present = np.array([v for turns in wrote for turn in turns for v in turn["versions"]]) == row["step"] - 1
        assert np.abs(whole.gap[present & passed]).max(initial=0) == pytest.approx(row.get("drift/max", 0.0), rel=0.01, abs=1e-7)


def ends_of_groups(ledger: Path) -> dict[str, str]:
    """How each group ended, in the steps that count; one that ended twice is a failure."""
    found: dict[str, tuple[int, str]] = {}
    for line in map(json.loads, ledger.read_text().splitlines()):
        if "back" in line:
            found = {group: (step, end) for group, (step, end) in found.items() if step <= line["back"]}
            continue
        assert line["group"] not in found, "it ended twice"
        found[line["group"]] = line["step"], line["end"]
    return {group: end for group, (_, end) in found.items()}


def check_synced_weights(run: Finished, steps: int, start: Path) -> None:
    """What the engine sampled at the last version has the log-probs of the exported weights, and not those of the first."""
    trained, first = log_probs_by(run.run_dir / "model"), log_probs_by(start)
    distance = []
    for trajectory in run.trajectories(f"eval_{steps:08d}.jsonl"):
        ids, places, logprobs = list(trajectory["prompt_ids"]), [], []
        for turn in trajectory["turns"]:
            if turn["role"] == "assistant":
                assert set(turn["versions"]) == {steps}
                places += range(len(ids), len(ids) + len(turn["token_ids"]))
                logprobs += turn["rollout_logp"]
            ids += turn["token_ids"]
        assert trained(ids)[places].tolist() == pytest.approx(logprobs, abs=AGREEMENT)
        distance += (first(ids)[places] - torch.tensor(logprobs)).abs().tolist()
    assert len(distance) > 100
    assert sum(distance) / len(distance) > 10 * AGREEMENT


def log_probs_by(path: Path) -> Callable[[list[int]], torch.Tensor]:
    """A function from token ids to the log-prob of each [T] under the model at `path`, by transformers; 0 for the first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def of(ids: list[int]) -> torch.Tensor:
        row = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), -1)
        return torch.cat([torch.zeros(1), row.gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).squeeze(-1)])

    return of


def trainer(below: list[psutil.Process]) -> psutil.Process:
    return next(process for process in below if "TrainerActor" in " ".join(process.cmdline()))


def keeper(below: list[psutil.Process]) -> psutil.Process:
    return next(process for process in below if "KeeperActor" in " ".join(process.cmdline()))


def scheduler(below: list[psutil.Process]) -> psutil.Process:
    """The server's child; its title says `sglang::scheduler`, but a forked process cannot always set one."""
    return schedulers(below)[0]


def schedulers(below: list[psutil.Process]) -> list[psutil.Process]:
    """One for each server, or part of one."""
    return [next(process for process in below if process.ppid() == part.pid) for part in parts_of_servers(below)]


def parts_of_servers(below: list[psutil.Process]) -> list[psutil.Process]:
    """Their main processes. Others have the same command line: forks that have not yet become something else."""
    named = {process.pid: process for process in below if "engine.sglang.entry" in " ".join(process.cmdline())}
    return [process for process in named.values() if process.ppid() not in named]
