"""The job file that `ctpo slurm` writes. tests/integration/test_slurm.py submits one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import InputError
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.slurm.render import Job, render
from ctpo_megatron.slurm.site import Site

LAUNCH = Path(__file__).resolve().parents[3] / "launch"


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


def lines(site: Site, nodes: int | None = None, **kwargs) -> list[str]:
    run, words = config(**kwargs), ["train.steps=3", "name=a b"]
    return render(Job(run.name, topology_of(run), Path("my config.yaml"), words, nodes), site, LAUNCH).splitlines()


def test_the_fewest_nodes_that_hold_all_gpus() -> None:
    assert topology_of(config()).gpus == 16
    assert "#SBATCH --nodes=2" in lines(Site())
    assert "#SBATCH --nodes=4" in lines(Site(gpus_per_node=4))
    assert "#SBATCH --nodes=3" in lines(Site(), dp=5)
    assert "#SBATCH --nodes=5" in lines(Site(), nodes=5)


def test_the_file_says_what_is_where() -> None:
    assert lines(Site())[1] == "# a run: 16 GPUs. 1 node for 8 trainer ranks, 1 node for 4 servers of 2 GPUs"
    assert lines(Site(), dp=5)[1].endswith("2 nodes for 10 trainer ranks, 1 node for 4 servers of 2 GPUs")
    assert lines(Site(), servers=3)[1].endswith("2 nodes for 8 trainer ranks, 1 node for 3 servers of 2 GPUs; 1 of them for both")


def test_options_reach_the_file_and_absent_ones_do_not() -> None:
    found = lines(Site(partition="gpu", time="01:00:00"))
    assert found[0] == "#!/bin/bash"
    wanted = {"job-name=a-run", "gpus-per-node=8", "ntasks-per-node=1", "partition=gpu", "time=01:00:00"}
    assert {f"#SBATCH --{line}" for line in wanted} <= set(found)
    assert {"#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --requeue"} <= set(found)
    assert {"#SBATCH --signal=B:USR1@600", "#SBATCH --open-mode=append"} <= set(found)
    assert not any(word in line for line in found for word in ("account", "None", "qos", "mail", "module"))


def test_every_option_of_a_site_has_its_place() -> None:
    """Each has a value here that is not the default; one without an effect on the file would be an option that does nothing."""
    site = Site.model_validate(
        {
            "partition": "p", "account": "a", "qos": "q", "constraint": "c", "reservation": "r", "time": "2-00:00:00",
            "gpus_per_node": 4, "signal_lead": 900, "requeue": False, "starts": 5, "preflight": False, "exclusive": False,
            "mail_user": "me@here", "mail_type": "END", "modules": ["cuda/13"], "environment": ["export NCCL_IB_HCA=mlx5"],
            "container": {"image": "/images/a.sqsh", "mounts": ["/a:/a", "/b:/b"], "workdir": "/a"},
            "sbatch": ["#SBATCH --licenses=x"], "spare_nodes": 1,
        }
    )  # fmt: skip
    assert all(getattr(site, name) != getattr(Site(), name) for name in Site.model_fields)
    found = lines(site)
    sbatch = {line.removeprefix("#SBATCH ") for line in found if line.startswith("#SBATCH")}
    assert {"--partition=p", "--account=a", "--qos=q", "--constraint=c", "--reservation=r", "--time=2-00:00:00"} <= sbatch
    assert {"--gpus-per-node=4", "--signal=B:USR1@900", "--no-requeue", "--licenses=x"} <= sbatch
    assert {"--mail-user=me@here", "--mail-type=END"} <= sbatch
    assert not {"--exclusive", "--mem=0", "--requeue"} & sbatch
    assert found.index("module load cuda/13") < found.index("export NCCL_IB_HCA=mlx5") < len(found) - 1
    words = shlex.split(found[-1])
    assert {"--starts=5", "--no-preflight", "--srun=--container-image=/images/a.sqsh"} <= set(words)
    assert {"--srun=--container-mounts=/a:/a,/b:/b", "--srun=--container-workdir=/a"} <= set(words)


def test_a_run_on_cpus_asks_for_no_gpus() -> None:
    found = lines(Site(gpus_per_node=0))
    assert "#SBATCH --nodes=1" in found
    assert not any("gpus" in line for line in found)


def test_spare_nodes_are_asked_for_and_a_lost_one_does_not_end_the_job() -> None:
    """Nor does it where the trainer may go on with fewer ranks; other runs are better off requeued."""
    spared, plain = lines(Site(spare_nodes=2)), lines(Site())
    assert {"#SBATCH --nodes=4", "#SBATCH --no-kill"} <= set(spared)
    assert spared[1].endswith("1 node for 4 servers of 2 GPUs; 2 spare")
    assert "#SBATCH --nodes=5" in lines(Site(spare_nodes=2), nodes=3)
    assert "#SBATCH --nodes=3" in lines(Site(spare_nodes=2, gpus_per_node=0))
    run = config()
    elastic = render(Job(run.name, topology_of(run), Path("c.yaml"), [], elastic=True), Site(), LAUNCH).splitlines()
    for found, wanted in ((spared, True), (elastic, True), (plain, False)):
        assert ("#SBATCH --no-kill" in found, "--no-kill" in shlex.split(found[-1])) == (wanted, wanted)


def test_words_of_the_command_stay_apart() -> None:
    command = shlex.split(lines(Site())[-1])
    assert command[:3] == ["exec", "bash", str(LAUNCH / "ctpo.sbatch")]
    assert command[command.index("--") :] == ["--", "my config.yaml", "train.steps=3", "name=a b"]


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(InputError, match=r"hold 8 GPUs; the run needs 16 .* at least 2 nodes"):
        lines(Site(), nodes=1)
    with pytest.raises(InputError, match=r"rollout\.engine\.tp=2 on rollout.engine.nodes=1 does not fit on nodes of 1 GPUs"):
        lines(Site(gpus_per_node=1))


def test_a_missing_launch_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the project's launch directory"):
        render(Job("a run", topology_of(config()), Path("c.yaml"), []), Site(), tmp_path)
