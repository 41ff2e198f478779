"""Whole runs on the real stack: layouts, an evaluation beside training, resuming, taking turns, going back."""

from __future__ import annotations

import json
import os
from collections import Counter

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctpo_megatron.record.now import read_now
from tests.support.reach import listeners
from tests.support.runs import Finished
from tests.support.traces import check_trace
from tests.support.whole_runs import (
    AGREEMENT,
    RUN_S,
    check_listeners,
    check_run,
    check_synced_weights,
    scheduler,
    start,
    trainer,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.mark.long
def test_dense_tp2_cp2_one_step_ahead(toy, tmp_path):
    """Four trainer ranks; rollouts are at most one version old, and some are. A Llama, on JSON lines.

    One of two servers keeps version 3 for an evaluation, while the trainer goes on with the other. Nothing of the run listens
    where another machine could reach it, and it does not come behind other work on its host. Sampling is truncated, and trainer
    and engine agree about the distribution that is left: `drift/max` in `check_run`. One step is traced.
    """
    sizes = ("train.staleness=1", "train.steps=4", "train.prompts_per_step=8", "rollout.group_size=4", "eval.prompts=8")
    cut = ("rollout.top_k=12", "rollout.top_p=0.9", "rollout.min_p=0.001", "algorithm.correction={type: truncate, high: 0.4}")
    benchmark = (f"eval.benchmarks.sums.file={toy['eval']}", "eval.benchmarks.sums.every=3", "eval.benchmarks.sums.samples=4")
    options = (*sizes, *cut, *benchmark, "rollout.engine.servers=2", "eval.servers=1", f"data.train={toy['train.jsonl']}")
    options = (*options, "trace.steps=[2]", "trace.profiler=[3]")
    started = start(toy, "dense_tp2_cp2.yaml", tmp_path, *options, kind="llama")
    started.wait_for_event("ready")
    below = started.descendants()
    found = listeners([psutil.Process(started.process.pid), *below])
    assert {trainer(below).nice(), scheduler(below).nice()} == {os.nice(0)}
    run = started.finish(RUN_S)
    check_run(run, 4)
    for row in (row for row in run.metrics if "train/loss" in row):
        assert 0.01 < row["train/support_mass"] < 0.99
        assert row["train/correction_before"] == pytest.approx(1, abs=AGREEMENT)
        assert row["train/correction"] == pytest.approx(0.4)
    assert [event["step"] for event in run.happened("weights shrunk")] == [1]
    check_listeners(found, ranks=4, parts_of_servers=2)
    check_evaluations(run)
    oldest = [row["rollout/staleness_max"] for row in run.metrics if "train/loss" in row]
    assert oldest[0] == 0
    assert max(oldest) == 1
    check_synced_weights(run, 4, toy["llama"])
    check_step_trace(run)


def check_step_trace(run: Finished) -> None:
    """Step 2 was traced over all processes, and by torch's profiler on one rank; what it did can be read."""
    servers = [each.name for each in read_now(run.run_dir / "now.json").servers]
    assert len(servers) == 2
    spans = check_trace(run.run_dir, 2, ["driver", *servers, *(f"trainer rank {rank}" for rank in range(4))])
    assert {"step 2", "rollout", "batch", "train", "publish", "publish/transfer"} <= {each["name"] for each in spans["driver"]}
    assert any(each["name"] == "/generate" for server in servers for each in spans[server])
    for rank in range(4):
        assert {"update", "forward", "backward", "optimizer", "publish"} <= {
            each["name"] for each in spans[f"trainer rank {rank}"]
        }
    (event,) = run.happened("trace written")
    assert (event["step"], event["processes"], event["left_out"]) == (2, 7, 0)
    assert event["error_us"] == 0.0, "all of them read one clock"
    assert sorted(each.name for each in (run.run_dir / "traces").iterdir()) == [
        "step_00000002.json.gz",
        "step_00000002.rank_3.profiler.json.gz",
    ]
    assert run.happened("trace lost") == []


def check_evaluations(run: Finished) -> None:
    """One benchmark was evaluated after step 3 beside training, both before the first step and after the last."""
    begun, done = run.happened("evaluation begun"), {each["step"]: each for each in run.happened("evaluation")}
    assert [(each["step"], each["servers"]) for each in begun] == [(3, 1)]
    both = {"held_out", "sums"}
    assert {step: set(each["benchmarks"]) for step, each in done.items()} == {0: both, 3: {"sums"}, 4: both}
    for step in done:
        turns = [turn for each in run.trajectories(f"eval_{step:08d}.jsonl") for turn in each["turns"]]
        assert {version for turn in turns if turn["role"] == "assistant" for version in turn["versions"]} == {step}
        result = json.loads((run.run_dir / "evals" / f"step_{step:08d}" / "sums.json").read_text())
        assert (result["problems"], result["version"]) == (8, step)
        estimates = result["estimates"]
        assert estimates.keys() == {"accuracy", "pass_at_2", "pass_at_4", "maj_at_2", "maj_at_4"}
        assert run.summary["evaluations"]["sums"][str(step)] == estimates
    shown = [row for row in run.metrics if "eval/pass_at_4_high/sums" in row]
    assert [(row["step"], "eval/accuracy" in row) for row in shown] == [(0, True), (3, False), (4, True)]


def test_moe_ep2_and_resume(toy, tmp_path):
    """Two steps through the experts that the engine chose, a checkpoint after each; a second command goes on to the third."""
    first = ("checkpoint.every=1", "checkpoint.export=false", "log.sinks=[{type: otel}]")
    run = start(toy, "moe.yaml", tmp_path, *first, kind="qwen3_moe").finish(RUN_S)
    check_run(run, 2)
    for row in (row for row in run.metrics if "train/loss" in row):
        assert row["routing/replayed"] == 1.0
        assert row["routing/changed"] <= 0.5  # the mean of two optimizer steps, before the first of which the routers agree
        assert row["moe/load_max_over_mean/layer_1"] >= 1.0
        assert 0 < row["moe/load_entropy/layer_1"] <= 1.0
    before = [row for row in run.metrics if row["step"] <= 2]
    more = ("checkpoint.every=1", "train.steps=3", "log.sinks=[{type: otel}]", "--resume")
    resumed = start(toy, "moe.yaml", tmp_path, *more, kind="qwen3_moe").finish(RUN_S)
    check_run(resumed, 3)
    assert [row for row in resumed.metrics if row["step"] <= 2] == before
    kinds = [event["event"] for event in resumed.events]
    assert kinds.count("ready") == 2  # events are history, and stay
    assert [event["step"] for event in resumed.happened("resumed")] == [2]
    differ = {event["key"]: event["effect"] for event in resumed.happened("setting differs")}
    assert differ == {"train.steps": "applies", "checkpoint.export": "applies"}
    assert "train.steps: 2 in the checkpoint, 3 now: applies from now on" in resumed.output
    assert [event["step"] for event in resumed.happened("checkpoint verified")] == [1, 2, 3]
    assert f"resumed from {tmp_path / 'checkpoints' / 'step_00000002'} at step 2" in resumed.output
    assert "checkpoint of step 3 verified after" in resumed.output
    check_synced_weights(resumed, 3, toy["qwen3_moe"])
    check_what_is_shown(resumed, 3)


@pytest.mark.long
def test_a_critic_that_warms_up_and_resumes(toy, tmp_path):
    """One attempt at each prompt, two context-parallel ranks; servers get the same weights once more while the head alone learns.

    A second command goes on with head and moments, and the model that is left has no head.
    """
    sizes = ("train.prompts_per_step=16", "train.optimizer_steps=2", "eval.prompts=8", "parallel.cp=2", "checkpoint.every=1")
    run = start(toy, "quickstart_critic.yaml", tmp_path, *sizes, "train.steps=2", "checkpoint.export=false").finish(RUN_S)
    check_run(run, 2)
    resumed = start(toy, "quickstart_critic.yaml", tmp_path, *sizes, "train.steps=3", "--resume").finish(RUN_S)
    check_run(resumed, 3)
    rows = [row for row in resumed.metrics if "train/loss" in row]
    assert [row["train/lr"] > 0 for row in rows] == [False, True, True]
    assert [row["publish/changed"] > 0 for row in rows] == [False, True, True]
    for row in rows:
        assert row["critic/lr"] > 0
        assert row["critic/explained_variance"] <= 1
        assert row["train/spared"] == 0
    other = ("train.steps=4", "algorithm.advantage={type: group}", "rollout.group_size=2", "--resume")
    refused = start(toy, "quickstart_critic.yaml", tmp_path, *sizes, *other).finish(RUN_S)
    assert refused.code == 2
    assert "the model in the checkpoint has a value head" in refused.output
    check_synced_weights(resumed, 3, toy["qwen3"])


def check_what_is_shown(run: Finished, steps: int) -> None:
    """TensorBoard and the sink have all steps of both commands, each once, and nothing was lost on the way."""
    rows = [row for row in run.metrics if "train/loss" in row]
    for row in rows:
        for name in ("servers/memory/server_0", "host/memory", "host/driver_memory", "host/trainer_memory", "host/disk_free"):
            assert row[name] > 0, name
        assert 0 < row["servers/busy/server_0"] <= 1
        assert all(0 <= row[f"train/waits/rank_{rank}"] < 1 for rank in range(2))
    samples = [int(row["progress/samples"]) for row in rows]
    assert samples == [len(run.trajectories(f"step_{step:08d}.jsonl")) * step for step in range(1, steps + 1)]
    board = EventAccumulator(str(run.run_dir / "tb"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, steps + 1))
    assert [event.step for event in board.Images("moe/load")] == list(range(1, steps + 1))
    by_samples = EventAccumulator(str(run.run_dir / "tb" / "by_samples")).Reload()
    assert [event.step for event in by_samples.Scalars("samples/train/loss")] == samples
    spans = [json.loads(line) for line in (run.run_dir / "spans.jsonl").read_text().splitlines()]
    whole = [span["name"] for span in spans if span["parent_id"] is None and span["name"] != "outside the steps"]
    assert whole == [f"step {n}" for n in range(1, steps + 1)]
    told = Counter(event["name"] for span in spans for event in span["events"])
    assert told == Counter(event["event"] for event in run.events if event["event"] != "step"), "what happened, each once"
    assert {"rollout", "batch", "train", "publish", "checkpoint"} <= {span["name"] for span in spans}
    assert len({span["resource"]["attributes"]["ctpo.run_id"] for span in spans}) == 1
    assert run.happened("points lost") == []


@pytest.mark.long
def test_trainer_and_servers_take_turns_and_a_run_that_leaves_its_course_goes_back(toy, tmp_path):
    """Colocated servers give back their memory at every step, and take it again with the new weights. A Qwen2.

    While a small learning rate warms up, weights move further from a reference with every step, so the loss of the fifth is
    several times the median of those before: the run goes back to the checkpoint before it, once, and goes on with other prompts.
    At the rate of the other runs the distance is large after two steps, and no longer grows.
    """
    sizes = ("train.steps=6", "train.prompts_per_step=4", "rollout.group_size=4", "eval.prompts=8", "checkpoint.every=2")
    course = ("train.spikes.loss=1e-9", "train.spikes.least=4", "train.spikes.patience=1", "train.spikes.returns=1")
    growing = ("algorithm.reference.coeff=0.5", "optimizer.lr=1.5e-4", "optimizer.warmup_steps=24")
    options = (*sizes, *course, *growing, "weights.type=colocated")
    run = start(toy, "quickstart.yaml", tmp_path, *options, kind="qwen2").finish(RUN_S)
    (back,) = run.happened("went back")
    assert (back["left"], back["step"], back["groups"]) == (5, 4, 4)
    assert run.happened("off course")[0]["metric"] == "train/loss"
    check_run(run, 6, passed_over=range(16, 20))
    for row in (row for row in run.metrics if "train/loss" in row):
        assert row["time/sleep"] > 0
        assert row["publish/wake"] > 0, "nobody had given memory back"
        assert (row["servers/serving"], row["servers/lost"]) == (1, 0)
    check_synced_weights(run, 6, toy["qwen2"])
