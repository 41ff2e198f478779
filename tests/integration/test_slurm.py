"""The launch scripts under a real SLURM of two nodes (each with its own loopback address) and a real Ray across them."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, missing_programs

from ctpo_megatron.cluster.slurm import SlurmOptions, render_sbatch
from ctpo_megatron.config.load import load_config
from ctpo_megatron.data.toy_model import make_toy_model
from ctpo_megatron.data.toy_task import make_toy_task

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "launch" / "run.sh"
ADDRESSES = ["127.0.0.2", "127.0.0.3"]
JOB_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 420.0
PATIENCE_S = 60.0

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}"),
]

# Prints the addresses that tasks ran on, then exits with a code that must come through.
SPREAD = """
import json, sys, time, ray
ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def where():
    time.sleep(0.5)
    return ray.util.get_node_ip_address()
found, deadline = set(), time.monotonic() + 60
while len(found) < 2 and time.monotonic() < deadline:
    found |= set(ray.get([where.remote() for _ in range(4)]))
json.dump(sorted(found), open(sys.argv[1], "w"))
sys.exit(7)
"""

# Tells that it runs, then waits for TERM; with "ask" it tells how many nodes Ray still had at that time.
WAITS = """
import json, os, signal, sys, time, ray
ray.init(address="auto", log_to_driver=False)
def end(number, frame):
    open(sys.argv[1] + ".signal", "w").close()
    if "ask" in sys.argv:
        json.dump({"alive": sum(n["Alive"] for n in ray.nodes())}, open(sys.argv[1] + ".part", "w"))
        os.rename(sys.argv[1] + ".part", sys.argv[1] + ".term")
    os._exit(143)
signal.signal(signal.SIGTERM, end)
open(sys.argv[1] + ".up" + os.environ.get("SLURM_RESTART_COUNT", "0"), "w").close()
time.sleep(200)
"""

# Stands for `ctpo`, whose arguments are what is looked at here.
FAKE_CTPO = """#!/bin/sh
for argument in "$@"; do echo "$argument"; done > "$CTPO_TEST_OUT"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "s", nodes=2) as cluster:
        yield cluster


def submit(slurm: SlurmCluster, tmp_path: Path, *command: str | Path) -> tuple[int, Path]:
    """A two-node job of `command`; its id and its output."""
    output = tmp_path / "job.out"
    line = "exec " + shlex.join(str(word) for word in command)
    return slurm.submit("--nodes=2", "--requeue", "--open-mode=append", f"--output={output}", "--wrap", line), output


def wait_until(condition: Callable[[], bool], output: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, output.read_text() if output.exists() else "the job wrote nothing"
        time.sleep(0.2)


def leftovers(job_id: int) -> list[str]:
    return [str(path) for path in Path("/tmp").glob(f"ray-{job_id}-*")]


def test_command_sees_both_nodes_and_its_exit_code_comes_through(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "spread.py").write_text(SPREAD)
    job_id, output = submit(slurm, tmp_path, RUN, sys.executable, tmp_path / "spread.py", tmp_path / "found.json")
    job = slurm.wait(job_id, JOB_TIMEOUT_S)
    assert json.loads((tmp_path / "found.json").read_text()) == ADDRESSES, output.read_text()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "7:0"), output.read_text()
    assert leftovers(job_id) == []


def test_warning_reaches_the_command_while_ray_is_up_and_requeues(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    job_id, output = submit(slurm, tmp_path, RUN, sys.executable, tmp_path / "waits.py", tmp_path / "mark", "ask")
    wait_until((tmp_path / "mark.up0").exists, output)
    slurm.command("scancel", "--batch", "--signal=USR1", str(job_id))  # what SLURM does ahead of the time limit
    wait_until((tmp_path / "mark.term").exists, output)
    assert json.loads((tmp_path / "mark.term").read_text()) == {"alive": 2}
    wait_until(lambda: slurm.job(job_id)["Restarts"] == "1", output)
    slurm.command("scancel", str(job_id))
    slurm.wait(job_id, JOB_TIMEOUT_S)


def test_command_ends_when_a_node_loses_ray(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    job_id, output = submit(slurm, tmp_path, RUN, sys.executable, tmp_path / "waits.py", tmp_path / "mark")
    wait_until((tmp_path / "mark.up0").exists, output)
    kill_raylet(job_id, ADDRESSES[1])
    job = slurm.wait(job_id, JOB_TIMEOUT_S)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0"), output.read_text()
    assert "Ray on n2 ended on its own" in output.read_text()
    assert "the Ray cluster ended while the command was running" in output.read_text()
    assert (tmp_path / "mark.signal").exists()
    assert leftovers(job_id) == []


def kill_raylet(job_id: int, address: str) -> None:
    """Kill the raylet that belongs to this job and node, by its pid."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
        except OSError:
            continue
        if line.split("\0")[0].endswith("/raylet") and f"ray-{job_id}-" in line and f"--node_ip_address={address}" in line:
            found.append(int(entry.name))
    assert len(found) == 1, f"raylets of job {job_id} at {address}: {found}"
    os.kill(found[0], 9)


def test_rendered_job_trains_and_resumes_after_a_requeue(slurm: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step_00000002").mkdir(parents=True)
    config_path = tmp_path / "run.yaml"
    config_path.write_text(f"name: t\nrun_dir: {run_dir}\nmodel: {{path: m}}\ndata: {{train: d.parquet}}\n")
    text = render_sbatch(load_config(config_path), config_path, ["train.steps=3"], SlurmOptions(gpus_per_node=0), ROOT / "launch")
    job_file = tmp_path / "job.sbatch"
    job_file.write_text(text)
    fake = tmp_path / "bin" / "ctpo"
    fake.parent.mkdir()
    fake.write_text(FAKE_CTPO)
    fake.chmod(0o755)
    path = os.pathsep.join([str(fake.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    requeued = {"PATH": path, "CTPO_TEST_OUT": str(tmp_path / "args"), "SLURM_RESTART_COUNT": "1"}
    output = tmp_path / "job.out"
    job_id = slurm.submit(f"--output={output}", str(job_file), environment=requeued)
    assert slurm.wait(job_id, JOB_TIMEOUT_S)["JobState"] == "COMPLETED", output.read_text()
    words = ["train", "--resume", str(config_path), "train.steps=3", "cluster.address=auto"]
    assert (tmp_path / "args").read_text().split() == words


def test_wrong_configuration_ends_the_job_before_ray_starts(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: t\nrun_dir: r\nmodel: {path: m}\ndata: {train: d.parquet}\ntrian: {}\n")
    output = tmp_path / "job.out"
    job_id = slurm.submit(f"--chdir={ROOT}", f"--output={output}", str(ROOT / "launch/ctpo.sbatch"), str(tmp_path / "run.yaml"))
    job = slurm.wait(job_id, JOB_TIMEOUT_S)
    assert job["ExitCode"] == "2:0", output.read_text()
    assert "Did you mean 'train'?" in output.read_text()
    assert "Ray at" not in output.read_text()


@pytest.mark.timeout(600)
def test_a_run_spreads_over_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    """One CPU on each node: the trainer's rank and the server end up on different ones."""
    task = make_toy_task(tmp_path / "data", seed=1, train_rows=64, eval_rows=8, sft_rows=8)
    model = make_toy_model(tmp_path / "model", "qwen3", seed=1, init_std=0.2)
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    overrides = [f"run_dir={run_dir}", f"model.path={model}", f"data.train={task.train}", f"data.eval={task.eval}"]
    overrides += ["train.steps=1", "train.prompts_per_step=4", "train.optimizer_steps=1", "rollout.group_size=2"]
    overrides += ["eval.prompts=4"]
    config_path = ROOT / "configs" / "quickstart.yaml"
    options = SlurmOptions(nodes=2, gpus_per_node=0)
    text = render_sbatch(load_config(config_path, overrides), config_path, overrides, options, ROOT / "launch")
    (tmp_path / "job.sbatch").write_text(text.replace("#SBATCH --exclusive\n", "#SBATCH --cpus-per-task=1\n"))
    job = slurm.wait(slurm.submit(f"--output={output}", str(tmp_path / "job.sbatch")), RUN_TIMEOUT_S)
    logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in (run_dir / "logs").glob("*"))
    assert job["JobState"] == "COMPLETED", output.read_text() + logs
    assert json.loads((run_dir / "summary.json").read_text())["weight_version"] == 1
    # the server's log holds its own address and that of the trainer it receives weights from
    assert set(re.findall(r"127\.0\.0\.\d+", (run_dir / "logs" / "server_0.log").read_text())) == set(ADDRESSES)
