"""The job file under a real SLURM of two nodes, each with its own network and process list, and a real Ray across them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctpo_megatron.cluster.slurm import SlurmOptions, render_sbatch
from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.toy.task import make_toy_task
from tests.support.slurm_cluster import SlurmCluster, obstacle

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
JOB_TIMEOUT_S = 240.0

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if reason := obstacle():
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "s", nodes=2) as cluster:
        yield cluster


def left_on_nodes(job_id: int) -> list[str]:
    return [str(path) for path in Path("/tmp").glob(f"ray-{job_id}-*")]


def test_a_run_spreads_over_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    """One CPU on each node: the trainer's rank and the server end up on different ones."""
    task = make_toy_task(tmp_path / "data", seed=1, train_rows=64, eval_rows=8, sft_rows=8)
    model = make_toy_model(tmp_path / "model", "qwen3", seed=1, init_std=0.2)
    run_dir, output = tmp_path / "run", tmp_path / "job.out"
    overrides = [f"run_dir={run_dir}", f"model.path={model}", f"data.train={task.train}", f"data.eval={task.eval}"]
    overrides += ["train.steps=1", "train.prompts_per_step=4", "train.optimizer_steps=1", "rollout.group_size=2"]
    overrides += ["eval.prompts=4"]
    options = SlurmOptions(nodes=2, gpus_per_node=0)
    run = load_config(CONFIG, overrides)
    text = render_sbatch(run.name, topology_of(run), CONFIG, overrides, options, ROOT / "launch")
    (tmp_path / "job.sbatch").write_text(text)
    job_id = slurm.submit(f"--output={output}", str(tmp_path / "job.sbatch"))
    job = slurm.wait(job_id, JOB_TIMEOUT_S)
    logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in (run_dir / "logs").glob("*"))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output.read_text() + logs
    assert json.loads((run_dir / "summary.json").read_text())["weight_version"] == 1
    # the server's log holds its own address and that of the trainer it receives weights from
    assert set(re.findall(r"198\.18\.\d+\.\d+", (run_dir / "logs" / "server_0.log").read_text())) == set(slurm.addresses.values())
    assert left_on_nodes(job_id) == []


def test_the_exit_code_of_the_run_is_that_of_the_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    """A configuration that reads well but names a missing model: `ctpo train` itself refuses it, with Ray up on both nodes."""
    output = tmp_path / "job.out"
    job = submit(slurm, output, str(CONFIG), f"run_dir={tmp_path / 'run'}")
    assert "Running command on head node" in output.read_text()
    assert job["ExitCode"] == "2:0", output.read_text()


def test_a_wrong_configuration_ends_the_job_before_ray_starts(slurm: SlurmCluster, tmp_path: Path) -> None:
    output = tmp_path / "job.out"
    job = submit(slurm, output, str(CONFIG), "trian.steps=1")
    assert job["ExitCode"] == "2:0", output.read_text()
    assert "Did you mean 'train'?" in output.read_text()
    assert "Ray" not in output.read_text()


def submit(slurm: SlurmCluster, output: Path, *words: str) -> dict[str, str]:
    """The record of a two-node job of launch/ctpo.sbatch, once it has ended."""
    script = str(ROOT / "launch" / "ctpo.sbatch")
    job_id = slurm.submit("--nodes=2", f"--chdir={ROOT}", f"--output={output}", script, *words)
    return dict(slurm.wait(job_id, JOB_TIMEOUT_S))
