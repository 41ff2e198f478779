"""Jobs under a real SLURM of two nodes, each with its own network and process list, and a real Ray across them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from ctpo_megatron.slurm.requeue import STARTS_FILE
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.slurm_cluster import SlurmCluster, obstacle

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
JOB_TIMEOUT_S = 480.0
ON_CPUS = {"gpus_per_node": 0}
# In place of `ctpo train`: what one start after the other is to do, a line of the file MOVES each. `ctpo` is all else.
STAND_IN = """#!/bin/bash
[ "$1" = train ] || exec CTPO "$@"
read -r move < MOVES && sed -i 1d MOVES
echo "start: $move, cluster $(echo "$@" | grep -o 'cluster.address=.*')"
case $move in
die) kill -KILL $$ ;;
wait) exec sleep 300 ;;
*) exit "$move" ;;
esac
"""
# In place of a run: what it does about the limit of its job, which somebody shortens to a minute.
LIMITED = """
import asyncio, subprocess, sys
from ctpo_megatron.jobs import time_limit
from ctpo_megatron.loop.orders import Orders

time_limit.ASK_EVERY_S = 1.0

async def main():
    orders = Orders()
    limit = time_limit.time_limit(time_limit.Lead(), 25.0, lambda event: print(event.sentence, flush=True))
    watching = asyncio.ensure_future(limit.watch(orders))
    await asyncio.sleep(3.0)
    assert orders.stop_request is None
    subprocess.run(["scontrol", "update", f"jobid={sys.argv[1]}", "timelimit=1"], check=True)
    await asyncio.wait_for(watching, 40.0)
    print(orders.stop_request.reason)

asyncio.run(main())
"""

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := obstacle():
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "s", nodes=2, cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A toy model and its task, as words of the command line."""
    directory = tmp_path_factory.mktemp("inputs")
    task = make_toy_task(directory / "data", seed=1, train_rows=64, eval_rows=8, sft_rows=8)
    model = make_toy_model(directory / "model", "qwen3", seed=1, init_std=0.2)
    return [f"model.path={model}", f"data.train={task.train}", f"data.eval={task.eval}"]


def submit(slurm: SlurmCluster, directory: Path, words: list[str], site: dict, *, nodes: int, path: str | None = None) -> int:
    """The id of the job that `ctpo slurm --submit` makes, sent from `directory`, with the options of a site."""
    file = directory / "site.yaml"
    file.write_text(yaml.safe_dump({**ON_CPUS, **site}))
    command = [sys.executable, "-m", "ctpo_megatron.cli", "slurm", str(CONFIG), *words, "--submit", f"--site={file}"]
    env = slurm.environment | ({"PATH": path} if path else {})
    done = subprocess.run(
        [*command, f"--nodes={nodes}"], cwd=directory, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"site options: {file}" in done.stderr
    found = re.search(r"submitted: job (\d+)", done.stdout)
    assert found, done.stdout
    return int(found[1])


def job_output(directory: Path, job_id: int) -> str:
    file = directory / f"slurm-{job_id}.out"
    return file.read_text(errors="replace") if file.is_file() else ""


def left_on_nodes(job_id: int) -> list[str]:
    return [str(path) for pattern in ("ray", "ctpo") for path in Path("/tmp").glob(f"{pattern}-{job_id}-*")]


@pytest.mark.long
def test_a_run_over_two_nodes_stops_is_requeued_and_goes_on_on_one_beside_a_strangers_ray(
    slurm: SlurmCluster, inputs: list[str], tmp_path: Path
) -> None:
    """Two CPUs on each node: the trainer's two ranks and the server end up on different ones. Preflight looks at both before.

    The job comes back with one node, which has room for a server and one rank: the run goes on in the smaller layout.
    """
    other = ["start", "--head", "--block", "--port=6379", "--num-cpus=1", "--include-dashboard=false"]
    temp = tempfile.mkdtemp(prefix="stranger-", dir="/tmp")  # short, since Unix sockets live below it
    ray = str(Path(sys.executable).parent / "ray")
    stranger = slurm.start_on("n1", ray, *other, f"--temp-dir={temp}", log=tmp_path / "stranger.log")
    try:
        slurm.until(lambda: "Ray runtime started" in (tmp_path / "stranger.log").read_text(), "the stranger's Ray")
        run_dir = tmp_path / "run"
        words = [*inputs, f"run_dir={run_dir}", "train.steps=20", "train.prompts_per_step=4", "train.optimizer_steps=1"]
        words += ["parallel.dp=2", "elastic.layouts=[{dp: 1}]", "elastic.wait_s=5"]
        job_id = submit(slurm, tmp_path, [*words, "rollout.group_size=2", "eval.prompts=4"], {}, nodes=2)
        slurm.until(lambda: "ready after" in job_output(tmp_path, job_id), "the run", JOB_TIMEOUT_S)
        slurm.until(lambda: '"event": "step"' in (run_dir / "events.jsonl").read_text(), "a step", JOB_TIMEOUT_S)
        slurm.command("scancel", "--batch", "--signal=USR1", str(job_id))
        slurm.wait_pending(job_id, JOB_TIMEOUT_S)
        slurm.command("scontrol", "update", f"jobid={job_id}", "numnodes=1-1", "numtasks=1")
        job, output = slurm.wait(job_id, JOB_TIMEOUT_S), job_output(tmp_path, job_id)
        logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in (run_dir / "logs").glob("*"))
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), output + logs
        assert output.index("All 2 nodes can start.") < output.index("The node can start."), output
        assert re.search(r"all-reduce .* GB/s by gloo, 16 MiB, 2 nodes", output), output
        assert output.index("SIGUSR1: stopping in order") < output.index(f"to requeue job {job_id}"), output
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        story = [each["event"] for each in events if each["event"] in ("ready", "layout", "stopped", "done")]
        assert story == ["ready", "stopped", "layout", "ready", "done"]
        assert [each["ranks"] for each in events if each["event"] == "layout"] == [1]
        (resumed,) = [each for each in events if each["event"] == "resumed"]
        assert resumed["step"] > 0
        assert json.loads((run_dir / "summary.json").read_text())["weight_version"] == 20
        # the server's log holds its own address and that of the trainer it receives weights from
        heard = set(re.findall(r"198\.18\.\d+\.\d+", (run_dir / "logs" / "server_0.log").read_text()))
        assert heard == set(slurm.addresses.values())
        assert left_on_nodes(job_id) == []
        assert stranger.poll() is None, (tmp_path / "stranger.log").read_text()
        names = [child.name() for child in psutil.Process(stranger.pid).children(recursive=True)]
        assert {"raylet", "gcs_server"} <= set(names), names
    finally:
        for process in [*psutil.Process(stranger.pid).children(recursive=True), stranger]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        stranger.wait(timeout=30)
        shutil.rmtree(temp, ignore_errors=True)


def drivers(job_id: int) -> list[psutil.Process]:
    """What stands in for the driver of a job and waits: processes of all nodes are this machine's too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline() == ["sleep", "300"] and process.environ().get("SLURM_JOB_ID") == str(job_id):
                found.append(process)
    return found


@pytest.mark.long
def test_where_requeue_is_forbidden_jobs_follow_each_other_until_it_is_in_vain(
    slurm: SlurmCluster, inputs: list[str], tmp_path: Path
) -> None:
    """A driver that is killed is started again once, with a new Ray; three starts without a checkpoint are enough."""
    path, run_dir = stand_in(tmp_path, ["die", "75", "75"]), tmp_path / "run"
    site = {"preflight": False, "requeue": False, "starts": 3}
    job_id = submit(slurm, tmp_path, [*inputs, f"run_dir={run_dir}"], site, nodes=2, path=path)
    first, output = slurm.wait(job_id, JOB_TIMEOUT_S), job_output(tmp_path, job_id)
    assert first["ExitCode"] == "75:0", output
    assert output.index("start: die") < output.index("The driver ended with SIGKILL") < output.index("start: 75"), output
    found = re.search(r"Job (\d+) goes on", output)
    assert found, output
    second = slurm.wait(int(found[1]), JOB_TIMEOUT_S)
    output = job_output(tmp_path, int(found[1]))
    assert (second["JobState"], second["ExitCode"]) == ("FAILED", "1:0"), output
    assert "the run has started 3 times and no checkpoint came of them" in output
    starts = [json.loads(line) for line in (run_dir / STARTS_FILE).read_text().splitlines()]
    assert [(each["job_id"], each["step"]) for each in starts] == [(job_id, -1), (job_id, -1), (int(found[1]), -1)]
    assert left_on_nodes(job_id) == left_on_nodes(int(found[1])) == []


def test_a_limit_that_comes_near_gives_the_order_to_stop(slurm: SlurmCluster, tmp_path: Path) -> None:
    """What squeue really says. Without any measured phase the run wants a minute."""
    (tmp_path / "limited.py").write_text(LIMITED)
    command = f"{shlex.join([sys.executable, str(tmp_path / 'limited.py')])} $SLURM_JOB_ID"
    job_id = slurm.submit("--time=60", f"--chdir={ROOT}", f"--output={tmp_path}/slurm-%j.out", f"--wrap={command}")
    job, output = slurm.wait(job_id, JOB_TIMEOUT_S), job_output(tmp_path, job_id)
    assert job["ExitCode"] == "0:0", output
    found = re.search(r"in (\d+) min; .*in (\d) min; .*time limit is (\d+) s away, and to stop may take 60 s", output, re.DOTALL)
    assert found, output
    assert int(found[1]) == 60
    assert int(found[2]) <= 1
    assert 0 < int(found[3]) < 60


def test_preflight_by_hand_refuses_and_names_the_nodes(slurm: SlurmCluster, inputs: list[str], tmp_path: Path) -> None:
    """A model that no node sees. `ctpo preflight` in an allocation starts its parts on all nodes by itself."""
    words = [str(CONFIG), *inputs, "model.path=/nowhere/model", f"run_dir={tmp_path / 'run'}"]
    command = shlex.join([sys.executable, "-m", "ctpo_megatron.cli", "preflight", *words])
    job_id = slurm.submit("--nodes=2", "--exclusive", f"--output={tmp_path}/slurm-%j.out", f"--wrap={command}")
    job, output = slurm.wait(job_id, JOB_TIMEOUT_S), job_output(tmp_path, job_id)
    assert job["ExitCode"] == "2:0", output
    assert "The run cannot start. n1: model and data; n2: model and data." in output
    assert "/nowhere/model" in output


def test_a_wrong_configuration_ends_the_job_before_ray_starts(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Sent by hand: `ctpo slurm` would have refused it."""
    output = tmp_path / "job.out"
    script = [str(ROOT / "launch" / "ctpo.sbatch"), "--", str(CONFIG), "trian.steps=1"]
    job_id = slurm.submit("--nodes=2", f"--chdir={ROOT}", f"--output={output}", f"--wrap=bash {' '.join(script)}")
    job = slurm.wait(job_id, JOB_TIMEOUT_S)
    assert job["ExitCode"] == "2:0", output.read_text()
    assert output.read_text().count("Did you mean 'train'?") == 1
    assert "Ray" not in output.read_text()


# From here on nodes are lost. SLURM 22.05 does not give back all cores of a job that was made smaller (it logs "unable to update
# job's core use information due to job resizing"), and a job that wants whole nodes then waits for minutes.


@pytest.mark.long
def test_a_node_that_goes_down_requeues_the_job(slurm: SlurmCluster, inputs: list[str], tmp_path: Path) -> None:
    path, run_dir = stand_in(tmp_path, ["wait", "0"]), tmp_path / "run"
    job_id = submit(slurm, tmp_path, [*inputs, f"run_dir={run_dir}"], {"preflight": False}, nodes=2, path=path)
    try:
        slurm.until(lambda: "start: wait" in job_output(tmp_path, job_id), "the run", JOB_TIMEOUT_S)
        slurm.command("scontrol", "update", "nodename=n2", "state=down", "reason=a test")
        slurm.until(lambda: slurm.job(job_id)["Restarts"] == "1", "the requeue", JOB_TIMEOUT_S)
    finally:
        # an error where the node has come back by itself, when its daemon registered again
        slurm.command("scontrol", "update", "nodename=n2", "state=resume", check=False)
    job, output = slurm.wait(job_id, JOB_TIMEOUT_S), job_output(tmp_path, job_id)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert output.index("start: wait") < output.index("start: 0"), output
    starts = [json.loads(line)["restarts"] for line in (run_dir / STARTS_FILE).read_text().splitlines()]
    assert starts == [0, 1]
    assert left_on_nodes(job_id) == []


@pytest.mark.long
def test_a_job_with_a_spare_node_outlives_a_lost_one(slurm: SlurmCluster, inputs: list[str], tmp_path: Path) -> None:
    """Neither the job nor its other steps end with the node, and a driver that is started again does without it."""
    path, run_dir = stand_in(tmp_path, ["wait", "0"]), tmp_path / "run"
    site = {"preflight": False, "spare_nodes": 1}
    job_id = submit(slurm, tmp_path, [*inputs, f"run_dir={run_dir}"], site, nodes=1, path=path)
    try:
        slurm.until(lambda: "start: wait" in job_output(tmp_path, job_id), "the run", JOB_TIMEOUT_S)
        assert slurm.job(job_id)["NumNodes"] == "2"
        slurm.command("scontrol", "update", "nodename=n2", "state=down", "reason=a test")
        slurm.until(lambda: "Ray has ended on all other nodes" in job_output(tmp_path, job_id), "the loss")
        assert slurm.job(job_id)["NumNodes"] == "1"
        (driver,) = drivers(job_id)
        driver.kill()
        slurm.until(lambda: "start: 0" in job_output(tmp_path, job_id), "the second start", JOB_TIMEOUT_S)
    finally:
        slurm.command("scontrol", "update", "nodename=n2", "state=resume", check=False)
    job, output = slurm.wait(job_id, JOB_TIMEOUT_S), job_output(tmp_path, job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), output


@pytest.mark.long
def test_a_spare_node_has_the_job_requeued_when_the_first_one_is_lost(
    slurm: SlurmCluster, inputs: list[str], tmp_path: Path
) -> None:
    """With --no-kill SLURM lets the job fail with its script. The node that was put down is back at once, and may refuse it."""
    path, run_dir = stand_in(tmp_path, ["wait", "wait"]), tmp_path / "run"
    site = {"preflight": False, "spare_nodes": 1}
    job_id = submit(slurm, tmp_path, [*inputs, f"run_dir={run_dir}"], site, nodes=1, path=path)
    try:
        slurm.until(lambda: "start: wait" in job_output(tmp_path, job_id), "the run", JOB_TIMEOUT_S)
        slurm.command("scontrol", "update", "nodename=n1", "state=down", "reason=a test")
        slurm.until(lambda: int(slurm.job(job_id)["Restarts"]) > 0, "the requeue", JOB_TIMEOUT_S)
    finally:
        slurm.command("scancel", str(job_id), check=False)
        slurm.until(lambda: mended(slurm), "the nodes")


def mended(slurm: SlurmCluster) -> bool:
    """Whether all nodes are idle, once what keeps them from jobs was taken from them."""
    slurm.command("scontrol", "update", "nodename=n[1-2]", "state=resume", check=False)
    return slurm.command("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle", "idle"]


def stand_in(directory: Path, moves: list[str]) -> str:
    """A PATH on which `ctpo` is STAND_IN, which will make `moves`."""
    place, python = directory / "bin", Path(sys.executable).parent
    place.mkdir()
    (directory / "moves").write_text("\n".join(moves) + "\n")
    text = STAND_IN.replace("MOVES", str(directory / "moves")).replace("CTPO", str(python / "ctpo"))
    (place / "ctpo").write_text(text)
    (place / "ctpo").chmod(0o755)
    return os.pathsep.join([str(place), str(python), os.environ["PATH"]])
