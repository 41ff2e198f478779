"""A whole run on the real stack with three teachers: one in the ranks, one of another family whose server the run starts, and one
on a server that runs already."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from ctpo_megatron.types import Generation
from tests.support.engines import RunningServer, load_reference, reference_logprobs, start_server
from tests.support.runs import Finished, Started

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(600)]

RUN_S = 400.0
AGREEMENT = 1e-4  # as of trainer and engine, float32 on CPUs
STEPS = 2


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toy")
    task = make_toy_task(root / "data", seed=1, train_rows=64, eval_rows=8, sft_rows=8)
    third = make_toy_task(root / "third", seed=2, train_rows=8, eval_rows=1, sft_rows=1)
    kinds = {"student": ("qwen3", 1), "near": ("qwen3", 2), "far": ("qwen2", 3), "theirs": ("qwen2", 4)}
    models = {name: make_toy_model(root / name, kind, seed=seed, init_std=0.2) for name, (kind, seed) in kinds.items()}
    return {"train": task.train, "eval": task.eval, "third": third.train, **models}


@pytest.fixture
def theirs(toy: dict[str, Path], tmp_path: Path) -> Iterator[RunningServer]:
    """A server that is none of the run's."""
    running = start_server(toy["theirs"], tmp_path / "theirs.log")
    yield running
    running.server.stop()


def test_a_run_follows_its_teachers(toy: dict[str, Path], theirs: RunningServer, tmp_path: Path) -> None:
    """What the record says of the distance to each teacher is what transformers finds on the trajectories beside it."""
    key, run_dir = tmp_path / "key", tmp_path / "run"
    key.write_text(f"{theirs.api_key}\n")
    teachers = (
        f"{{name: far, type: started, path: {toy['far']}, sources: [train], engine: {{max_total_tokens: 8192}}}}",
        f"{{name: near, type: copied, path: {toy['near']}}}",
        f"{{name: theirs, type: served, path: {toy['theirs']}, sources: [third], urls: ['{theirs.url}'], key_file: {key}}}",
    )
    settings = (
        f"model.path={toy['student']}",
        f"data.train={toy['train']}",
        "data.eval=null",
        f"data.mixture=[{{name: other, path: {toy['eval']}}}, {{name: third, path: {toy['third']}}}]",
        f"algorithm.distillation.teachers=[{', '.join(teachers)}]",
        "rollout.group_size=1",
        f"train.steps={STEPS}",
        "train.prompts_per_step=16",
        "train.optimizer_steps=2",
        "rollout.engine.max_total_tokens=16384",
    )
    started = Started("train", "quickstart_distill.yaml", run_dir, *settings)
    try:
        started.wait_for_event("ready")
        servers = [each for each in started.descendants() if each.name().startswith("sglang")]
        run = started.finish(RUN_S)
    finally:
        started.end()
    assert run.code == 0, run.output
    assert servers, "they have names"
    assert [each for each in servers if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
    assert theirs.server.alive(), "a run ends no server of others"
    written = [each for each in run_dir.rglob("*") if each.is_file()]
    assert [each for each in written if theirs.api_key.encode() in each.read_bytes()] == []
    rows = [row for row in run.metrics if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    said = {name: load_reference(toy[name]) for name in ("near", "far", "theirs")}
    for row in rows:
        require_known(row.keys() - {"step", "time"})
        assert row["train/spared"] == 0
        assert row["train/grad_norm"] > 0
        assert row["teacher/seconds"] > 0
        assert row["teacher/retries"] == 0
        assert row["teacher/weight"] > 1
        check_distances(row, run, said)
    assert (run_dir / "logs" / "teacher_far_0.log").is_file()


def check_distances(row: dict[str, Any], run: Finished, said: dict[str, torch.nn.Module]) -> None:
    gaps: dict[str, list[float]] = {name: [] for name in said}
    asked = {line["group"]: line["prompt"] for line in map(json.loads, (run.run_dir / "ledger.jsonl").read_text().splitlines())}
    for each in run.trajectories(f"step_{row['step']:08d}.jsonl"):
        source = asked[each["group"]].partition(":")[0]
        teacher = {"other": "near", "third": "theirs"}.get(source, "far")
        tokens = [token for turn in each["turns"] for token in turn["token_ids"]]
        logp = reference_logprobs(said[teacher], each["prompt_ids"], Generation(tokens), 1.0)
        of_engine = [x for turn in each["turns"] for x in turn["rollout_logp"]]
        own = [turn["role"] == "assistant" for turn in each["turns"] for _ in turn["token_ids"]]
        gaps[teacher] += [a - b for a, b, mine in zip(of_engine, logp, own, strict=True) if mine]
    assert all(gaps.values()), "all sources are in every step"
    for name, found in gaps.items():
        held = np.clip(found, -20, 20)
        assert row[f"teacher/kl/{name}"] == pytest.approx(float(held.mean()), abs=AGREEMENT), name
    assert math.isfinite(row["teacher/kl"])
