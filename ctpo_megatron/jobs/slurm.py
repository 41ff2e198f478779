"""`ctpo slurm`: the job file of a run, printed, sent to SLURM, or shown with all that follows from it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.jobs.plan import plan_job
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.planning.plan import Hardware
from ctpo_megatron.slurm.commands import ask
from ctpo_megatron.slurm.render import Job, render
from ctpo_megatron.slurm.site import Site

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
GPU_GIB = 80.0  # that a plan is made for unless `ctpo plan --gpu-gb` says otherwise


def job_text(config: RunConfig, where: Path, overrides: list[str], nodes: int | None, site: Site, source: Path | None) -> str:
    """Returns the job file of the configuration in the file `where`, with the site's options, read from `source`."""
    job = Job(config.name, topology_of(config), where, overrides, nodes, elastic=bool(config.elastic.layouts))
    return render(job, site, LAUNCH, source=None if source is None else str(source))


def submit(text: str) -> str:
    """Returns the id of the job that SLURM made of a job file. Raises SlurmError with SLURM's words where it refused."""
    with tempfile.NamedTemporaryFile("w", prefix="ctpo-", suffix=".sbatch", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return ask("sbatch", "--parsable", file.name).partition(";")[0]


def dry_run(config: RunConfig, where: Path, text: str, site: Site) -> None:
    """Print the job file, the resolved configuration and the plan. Raises ConfigError for what cannot run."""
    print(f"--- job file\n{text}\n--- configuration\n{dump_config(config)}\n--- plan", flush=True)
    plan_job(config, where, None, Hardware(GPU_GIB, None, site.gpus_per_node or 8))


def say_site(source: Path | None, default: Path) -> None:
    """Say on stderr where the site's options come from: stdout is the job file."""
    words = f"site options: {source}" if source else f"no site options: {default} is not there, and no --site was given"
    print(words, file=sys.stderr)
