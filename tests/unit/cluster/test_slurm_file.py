"""The job file that `ctpo slurm` writes. tests/integration/test_slurm.py submits one."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from ctpo_megatron.cluster.slurm import SlurmOptions, render_sbatch
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import InputError
from ctpo_megatron.jobs.topology import topology_of

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "ctpo.sbatch", ROOT / ".ci" / "run"]


def config(name: str = "a run", tp: int = 2, dp: int = 4, servers: int = 4, engine_tp: int = 2) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": name,
            "run_dir": "r",
            "model": {"path": "m"},
            "data": {"train": "d"},
            "parallel": {"tp": tp, "dp": dp},
            "rollout": {"engine": {"servers": servers, "tp": engine_tp}},
        }
    )


def lines(options: SlurmOptions, **kwargs) -> list[str]:
    run, words = config(**kwargs), ["train.steps=3", "name=a b"]
    return render_sbatch(run.name, topology_of(run), Path("my config.yaml"), words, options, LAUNCH).splitlines()


def test_the_fewest_nodes_that_hold_all_gpus() -> None:
    assert topology_of(config()).gpus == 16
    assert "#SBATCH --nodes=2" in lines(SlurmOptions())
    assert "#SBATCH --nodes=4" in lines(SlurmOptions(gpus_per_node=4))
    assert "#SBATCH --nodes=3" in lines(SlurmOptions(), dp=5)
    assert "#SBATCH --nodes=5" in lines(SlurmOptions(nodes=5))


def test_options_reach_the_file_and_absent_ones_do_not() -> None:
    found = lines(SlurmOptions(partition="gpu", time="01:00:00"))
    assert found[0] == "#!/bin/bash"
    wanted = {"job-name=a-run", "gpus-per-node=8", "ntasks-per-node=1", "partition=gpu", "time=01:00:00"}
    assert {f"#SBATCH --{line}" for line in wanted} <= set(found)
    assert {"#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --no-requeue"} <= set(found)
    assert not any("account" in line or "None" in line for line in found)


def test_the_general_job_file_asks_for_whole_nodes() -> None:
    """--exclusive alone gives all CPUs and GPUs, but the partition's default of memory."""
    asked = {line for line in (LAUNCH / "ctpo.sbatch").read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"#SBATCH --exclusive", "#SBATCH --mem=0"} <= asked


def test_a_node_raises_its_limits_as_far_as_it_may() -> None:
    """The lines of node.sh up to the first that needs SLURM, in a shell with low limits."""
    head = (LAUNCH / "node.sh").read_text().partition("scratch=")[0]
    for lower, hard in (("ulimit -S -n 256; ulimit -H -n 4096", "4096"), ("ulimit -S -n 256", None)):
        script = f"{lower}; ulimit -S -l 64; {head}\necho $(ulimit -S -n) $(ulimit -H -n) $(ulimit -S -l) $(ulimit -H -l)"
        done = subprocess.run(
            ["bash", "-c", script, "node.sh", "h:1", "1"], capture_output=True, text=True, timeout=10, check=True
        )
        files, most, locked, most_locked = done.stdout.split()
        assert files == (hard or (most if most != "unlimited" and int(most) < 65536 else "65536"))
        assert locked == most_locked


def test_a_run_on_cpus_asks_for_no_gpus() -> None:
    found = lines(SlurmOptions(gpus_per_node=0))
    assert "#SBATCH --nodes=1" in found
    assert not any("gpus" in line for line in found)


def test_words_of_the_command_stay_apart() -> None:
    command = shlex.split(lines(SlurmOptions())[-1])
    assert command == ["exec", "bash", str(LAUNCH / "ctpo.sbatch"), "my config.yaml", "train.steps=3", "name=a b"]


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(InputError, match=r"hold 8 GPUs; the run needs 16 .* at least 2 nodes"):
        lines(SlurmOptions(nodes=1))
    with pytest.raises(InputError, match=r"rollout\.engine\.tp=2 on rollout.engine.nodes=1 does not fit on nodes of 1 GPUs"):
        lines(SlurmOptions(gpus_per_node=1))


def test_a_missing_launch_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the project's launch directory"):
        render_sbatch("a run", topology_of(config()), Path("c.yaml"), [], SlurmOptions(), tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
