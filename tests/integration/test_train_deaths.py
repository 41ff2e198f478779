"""Whole runs on the real stack that lose something: a server, a rank, the copy of their state, their directory."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter

import psutil
import pytest
from leftovers import left_in_shared_memory, living, shared_memory

from tests.support.reach import listeners, strangers
from tests.support.runs import END_S, check_stopped
from tests.support.whole_runs import (
    RUN_S,
    check_listeners,
    check_run,
    check_synced_weights,
    ends_of_groups,
    keeper,
    parts_of_servers,
    scheduler,
    schedulers,
    start,
    trainer,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.mark.long
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
    [
        (trainer, "trainer rank 0", "trainer_0.log"),
        pytest.param(scheduler, "inference server 0", "server_0.log", marks=pytest.mark.long),
    ],
)
def test_death_of_a_process_ends_the_run(toy, tmp_path, victim, name, log):
    """Of a trainer's rank, and of the last server, when they have been started again as often as they may."""
    shared_before = shared_memory()
    never = ("rollout.engine.restarts=0", "cluster.restarts=0")
    run = start(toy, "quickstart.yaml", tmp_path, "eval.prompts=8", *never)
    run.wait_for_event("ready")
    below = run.descendants()
    assert " OMP_WAIT_POLICY=passive" in (tmp_path / "logs" / "trainer_0.log").read_text()
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
    copy: it goes back to its checkpoint. Then Ctrl-C, and a command that goes on.

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
    run.interrupt(signal.SIGINT)
    stopped = run.finish(RUN_S)
    check_stopped(stopped, signal.SIGINT, times=1, code=75)
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
