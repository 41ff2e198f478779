"""Whole runs on the real stack: layouts, resuming, crashes, signals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from leftovers import left_in_shared_memory, living, shared_memory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctpo_megatron.record.catalogue import require_known
from ctpo_megatron.record.now import read_now
from ctpo_megatron.record.token_files import NOT_TRAINED, StoredTokens, token_file
from ctpo_megatron.toy.model import Kind, make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.reach import Listener, listeners, strangers
from tests.support.runs import END_S, Finished, Started
from tests.support.traces import check_trace

RUN_S = 300.0
AGREEMENT = 1e-4  # largest difference of a token's log-prob between trainer and engine, float32 on CPUs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toy")
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
    one = {"driver", "Ray's GCS", "raylet", "Ray's dashboard agent", "Ray's runtime environment agent"}
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


def test_trainer_and_servers_take_turns_and_a_run_that_leaves_its_course_goes_back(toy, tmp_path):
    """Colocated servers give back their memory at every step, and take it again with the new weights. A Qwen2.

    While the learning rate warms up, weights move further from a reference with every step, so the loss of the fifth is above
    those before: the run goes back to the checkpoint before it, once, and goes on with other prompts.
    """
    sizes = ("train.steps=6", "train.prompts_per_step=4", "rollout.group_size=4", "eval.prompts=8", "checkpoint.every=2")
    course = ("train.spikes.loss=1e-9", "train.spikes.least=4", "train.spikes.patience=1", "train.spikes.returns=1")
    growing = ("algorithm.reference.coeff=0.5", "optimizer.warmup_steps=24")
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


def test_a_server_that_dies_is_started_again(toy, tmp_path):
    """The only server, on two nodes, loses its second half between two steps: the run waits, it comes back, nothing is lost."""
    sizes = ("train.steps=4", "train.prompts_per_step=8", "rollout.group_size=4", "eval.prompts=8")
    run = start(toy, "quickstart.yaml", tmp_path, *sizes, "rollout.engine.tp=2", "rollout.engine.nodes=2")
    run.wait_for_event("ready")
    below = run.descendants()
    found = listeners([psutil.Process(run.process.pid), *below])
    words = [" ".join(part.cmdline()) for part in parts_of_servers(below)]
    assert len(words) == 2
    (second,) = (at for at, each in enumerate(words) if "--nnodes 2 --node-rank 1 " in each)
    victim = schedulers(below)[second]
    run.wait_for_event("step", step=1)
    victim.kill()
    ended = run.finish(RUN_S)
    check_run(ended, 4)
    check_listeners(found, ranks=1, parts_of_servers=2)
    check_synced_weights(ended, 4, toy["qwen3"])
    assert "inference server 0 is lost: inference server 0, node 1" in ended.output
    assert (tmp_path / "logs" / "server_0_node_1.log").stat().st_size > 0
    assert "serves again, with version" in ended.output
    last = [row for row in ended.metrics if "train/loss" in row][-1]
    assert last["servers/lost"] == 1
    assert last["servers/rejoined"] == 1
    for step in range(1, 5):
        trajectories = ended.trajectories(f"step_{step:08d}.jsonl")
        assert len(trajectories) == 32
        versions = {version for each in trajectories for turn in each["turns"] for version in turn.get("versions") or []}
        assert versions == {step - 1}


@pytest.mark.parametrize(
    ("victim", "name", "log"),
    [(trainer, "trainer rank 0", "trainer_0.log"), (scheduler, "inference server 0", "server_0.log")],
)
def test_death_of_a_process_ends_the_run(toy, tmp_path, victim, name, log):
    """Of a trainer's rank, and of the last server, when they have been started again as often as they may."""
    shared_before = shared_memory()
    never = ("rollout.engine.restarts=0", "cluster.restarts=0")
    run = start(toy, "quickstart.yaml", tmp_path, "eval.prompts=8", *never)
    run.wait_for_event("ready")
    below = run.descendants()
    assert trainer(below).environ()["OMP_WAIT_POLICY"] == "passive"
    victim(below).kill()
    ended = run.finish(END_S)
    assert ended.code == 1
    error = ended.output[ended.output.index("\nerror:") :]
    assert name in error
    assert str(tmp_path / "logs" / log) in error
    assert living(below) == []
    assert left_in_shared_memory(shared_before) == set()


@pytest.mark.long
def test_a_lost_rank_comes_back_and_the_journal_makes_the_same_weights(toy, tmp_path):
    """A rank is killed: the trainer goes on from the copy in memory, the server stays. Then a rank and the process with the
    copy: it goes back to its checkpoint. Then STOP, and a command that goes on.

    A run without any of that, which is given what this one has sampled, ends with the same weights, bit for bit. In both a step
    takes the first groups to finish, others go on into the next, and one without a difference is replaced.
    """
    steps = 10
    sizes = (f"train.steps={steps}", "train.prompts_per_step=4", "train.optimizer_steps=2", "rollout.group_size=4")
    # an untrained model earns no reward: the distance from a reference gives gradients that depend on what was sampled
    pull = ("algorithm.reference.coeff=0.5", "train.staleness=1", "train.oversample=2", "rollout.dynamic.max_refills=1")
    options = (*sizes, *pull, "eval.prompts=8", "rollout.max_response_tokens=64", "checkpoint.every=0", "checkpoint.journal=all")
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    run = start(toy, "quickstart.yaml", broken, *options, "checkpoint.memory.every=1")
    kept = run.wait_for_event("copy kept")
    server = scheduler(run.descendants()).pid
    killed = trainer(run.descendants())
    killed.kill()
    killed.wait(END_S)  # one that ends has sockets for a moment longer than a command line
    assert strangers(listeners([psutil.Process(run.process.pid), *run.descendants()])) == []
    back = run.wait_for_event("trainer restarted")
    assert back["step"] >= kept["step"] >= 1
    assert not (broken / "checkpoints").exists(), "there was nothing but the copy to come back from"
    assert [(each["checkpoint"], each["step"]) for each in run.happened("resumed")] == [("memory", back["step"])]
    below = run.descendants()
    victims = keeper(below), trainer(below)
    (broken / "SAVE").touch()
    saved = run.wait_for_event("checkpoint verified")
    for victim in victims:
        victim.kill()
    second = run.wait_for_event("trainer restarted", step=saved["step"])
    assert second["time"] > saved["time"]
    assert run.happened("copy lost"), "nobody said that the copy was gone"
    assert run.happened("resumed")[-1]["checkpoint"] == str(broken / "checkpoints" / f"step_{saved['step']:08d}")
    assert scheduler(run.descendants()).pid == server
    (broken / "STOP").touch()
    stopped = run.finish(RUN_S)
    assert stopped.code == 75, stopped.output
    again = start(toy, "quickstart.yaml", broken, *options, "--resume", "auto").finish(RUN_S)
    check_run(again, steps)
    (straight / "journal").mkdir(parents=True)
    for path in (broken / "journal").iterdir():
        shutil.copy(path, straight / "journal")
    check_run(start(toy, "quickstart.yaml", straight, *options, "--resume", "auto").finish(RUN_S), steps)
    assert all(row["train/grad_norm"] > 0 for row in again.metrics if row["step"] > 1 and "train/loss" in row)
    for step in range(1, steps + 1):
        sampled = [(each / "rollouts" / f"step_{step:08d}.jsonl").read_bytes() for each in (broken, straight)]
        assert sampled[0] == sampled[1]
    weights = [(each / "model" / "model.safetensors").read_bytes() for each in (broken, straight)]
    assert weights[0] == weights[1]
    ends = [Counter(ends_of_groups(each / "ledger.jsonl").values()) for each in (broken, straight)]
    assert ends[0] == ends[1] == {"trained": 4 * steps, "filtered": steps}
    stale = [row["rollout/staleness_max"] for row in again.metrics if "train/loss" in row]
    assert max(stale) <= 1


@pytest.mark.long
def test_a_run_directory_that_goes_away_is_waited_for(toy, tmp_path):
    """It is moved away and comes back: the run goes on, and nothing is missing or there twice.

    Then it is away for good, and the run is asked to stop: it ends in time and says why. The next command goes on.
    """
    run_dir, away = tmp_path / "run", tmp_path / "away"
    sizes = ("train.prompts_per_step=8", "rollout.group_size=4", "eval.prompts=8", "checkpoint.every=1")
    run = start(toy, "quickstart.yaml", run_dir, *sizes, "train.steps=40")
    run.wait_for_event("step", step=1)
    run_dir.rename(away)
    time.sleep(10.0)
    assert run.process.poll() is None
    assert not run_dir.exists(), "something was made in its place"
    away.rename(run_dir)
    mended = run.wait_for_event("storage mended")
    run.wait_for_event("checkpoint verified", step=run.happened("step")[-1]["step"] + 1)
    below = run.descendants()
    run_dir.rename(away)
    run.process.send_signal(signal.SIGTERM)
    code = run.process.wait(END_S)
    assert not run_dir.exists(), "something was made in its place"
    away.rename(run_dir)
    assert (code, living(below)) == (1, [])
    assert f"{run_dir}: no such file or directory" in run.text[run.text.index("\nerror:") :]
    done = run.happened("step")[-1]["step"]
    fault = run.happened("storage fault")[0]
    assert 5 < mended["seconds"] <= mended["time"] - fault["time"] + 1
    assert str(run_dir) in fault["reason"]
    ended = start(toy, "quickstart.yaml", run_dir, *sizes, f"train.steps={done + 2}", "--resume", "auto").finish(RUN_S)
    check_run(ended, done + 2)
    assert ended.happened("storage fault") == [fault]
