"""`ctpo eval` on real servers: killed, and resumed by the same command."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from leftovers import living

from ctpo_megatron.jobs.evaluate import JOURNAL
from ctpo_megatron.record.segments import read_segment, segments
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from ctpo_megatron.types import AttemptId, GroupId
from tests.support.runs import Started

RUN_S = 300.0
ENOUGH = 12  # attempts that are done when it is killed, of 96

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]


def whole(run_dir: Path) -> list[str]:
    """The ids of the attempts that the journal holds to their ends, each as often as it was noted."""
    directory = run_dir / "evals" / "model" / JOURNAL
    found = []
    for path in segments(directory) if directory.exists() else []:
        made = [msgspec.msgpack.decode(payload).get("trajectory") for _, payload in read_segment(path)]
        found += [str(AttemptId(GroupId(**each["id"]["group"]), each["id"]["number"])) for each in made if each is not None]
    return found


def test_a_killed_evaluation_samples_nothing_twice(tmp_path: Path) -> None:
    task = make_toy_task(tmp_path / "data", seed=1, train_rows=8, eval_rows=16, sft_rows=8)
    model = make_toy_model(tmp_path / "model", seed=1, init_std=0.2)
    paths = (f"data.eval={task.eval}", f"model.path={model}", f"eval.benchmarks.sums.file={task.train}")
    sizes = ("eval.samples=4", "eval.temperature=1.0", "rollout.concurrency=4", "rollout.max_turns=1")

    def begin(*more: str) -> Started:
        return Started("eval", "quickstart.yaml", tmp_path / "run", *paths, *sizes, *more)

    first = begin()
    until = time.monotonic() + RUN_S
    while len(whole(first.run_dir)) < ENOUGH:
        assert first.process.poll() is None, first.text
        assert time.monotonic() < until, first.text
        time.sleep(0.05)
    below = first.descendants()
    first.process.kill()
    first.process.wait(10)
    kept = whole(first.run_dir)
    assert len(kept) < 96
    second = begin().finish(RUN_S)
    assert second.code == 0, second.output
    assert f"the journal holds {len(kept)} finished attempts" in second.output
    ids = whole(second.run_dir)
    assert ids[: len(kept)] == kept
    assert Counter(ids) == Counter(dict.fromkeys(set(ids), 1))
    assert len(ids) == (16 + 8) * 4
    found = json.loads((second.run_dir / "eval.json").read_text())
    assert found["benchmarks"].keys() == {"held_out", "sums"}
    assert {f"eval/{name}/sums" for name in ("accuracy", "pass_at_2", "maj_at_4_low")} <= found.keys()
    result = json.loads((second.run_dir / "evals" / "model" / "held_out.json").read_text())
    attempts = [each for problem in result["by_problem"] for each in problem["attempts"]]
    assert len(attempts) == 64
    assert "held_out" in second.output[second.output.index("avg@n") :]
    assert living(below, 60.0) == []
