"""A run that loses the nodes its trainer is on: a spare one is used, then a smaller layout, and nothing of the run is lost."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.ray_nodes import RayNodes
from tests.support.runs import Started, check_stopped

pytestmark = [pytest.mark.long, pytest.mark.integration, pytest.mark.timeout(600)]
SERVER, RANK = "ctpo_megatron.engine.sglang.entry", "TrainerActor"
FEW = ("train.steps=1000", "train.prompts_per_step=4", "train.optimizer_steps=1", "rollout.group_size=2", "eval.prompts=4")
ELASTIC = ("parallel.dp=2", "elastic.layouts=[{dp: 1}]", "elastic.wait_s=5", "checkpoint.every=2", "cluster.restarts=2")


def steps_after(run: Started, event: dict, more: int = 1) -> None:
    """Wait for some training steps behind an event."""
    deadline = time.monotonic() + 120
    while sum(each["time"] > event["time"] for each in run.happened("step")) < more:
        assert run.process.poll() is None, run.text
        assert time.monotonic() < deadline, run.text
        time.sleep(0.2)


def test_a_trainer_goes_on_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks and a server on two nodes. The first loss is met by a spare node, the second by one rank less; when a node has
    come, the next restart finds it. The server is never touched."""
    task = make_toy_task(tmp_path / "data", seed=1, train_rows=64, eval_rows=8, sft_rows=8)
    model = make_toy_model(tmp_path / "model", "qwen3", seed=1, init_std=0.2)
    words = (f"model.path={model}", f"data.train={task.train}", f"data.eval={task.eval}", *FEW, *ELASTIC)
    with RayNodes(cpus=2) as nodes:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, nodes.environment[name])
        second = nodes.add(cpus=1)
        run = Started("train", "quickstart.yaml", tmp_path / "run", *words, f"cluster.address={nodes.address}")
        try:
            steps_after(run, run.wait_for_event("ready"))
            assert run.happened("layout") == [], "the preferred layout, at once"
            servers = nodes.on(nodes.head, SERVER)
            assert servers
            assert len(nodes.on(second, RANK)) == 1
            spare = nodes.add(cpus=1)
            nodes.lose(second)
            steps_after(run, run.wait_for_event("layout", ranks=2, preferred=True) | run.wait_for_event("trainer restarted"))
            assert len(nodes.on(spare, RANK)) == 1
            nodes.lose(spare)
            smaller = run.wait_for_event("layout", ranks=1, preferred=False)
            steps_after(run, smaller)
            nodes.add(cpus=1)
            nodes.on(nodes.head, RANK)[0].kill()
            steps_after(run, run.wait_for_event("layout", ranks=2, reason="there is room for its 2 ranks"))
            assert nodes.on(nodes.head, SERVER) == servers
            run.process.send_signal(signal.SIGTERM)
            finished = run.finish(90)
        finally:
            run.end()
    check_stopped(finished, signal.SIGTERM, times=1, code=75)
    assert [each["ranks"] for each in finished.happened("layout")] == [2, 1, 2]
    assert len(finished.happened("nodes lost")) == 2
    assert finished.happened("server lost") == []
    trained = Counter[str]()
    for path in sorted((tmp_path / "run" / "rollouts").glob("step_*.jsonl")):
        trained.update({json.loads(line)["group"] for line in path.read_text().splitlines()})
    assert set(trained.values()) == {1}
    assert set(trained) == {f"g{number:08d}" for number in range(len(trained))}
