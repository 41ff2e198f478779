"""What a cluster wants of every job: a YAML file that is written once for a site, and the command line on top of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PositiveInt, ValidationError

from ctpo_megatron.config.base import Section
from ctpo_megatron.config.explain import explain
from ctpo_megatron.config.sources import COMMAND_LINE, Source, home_path, merge, read_file, resolve
from ctpo_megatron.errors import ConfigError

# What sbatch takes: minutes, minutes:seconds, hours:minutes:seconds, and days before hours
_TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}|UNLIMITED")
_OURS = ("nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue", "no-requeue", "no-kill", "open-mode")


def _time(text: object) -> str:
    if isinstance(text, int):
        raise ValueError(f"{text} is a number; write the time in quotes, since YAML takes 24:00:00 for a number of seconds")
    if not isinstance(text, str) or not _TIME.fullmatch(text):
        raise ValueError(f"{text!r} is no time limit; write it as sbatch takes it, like 24:00:00 or 2-00:00:00")
    return text


def _one_line(text: str) -> str:
    if not text.strip() or len(text.splitlines()) != 1:
        raise ValueError(f"{text!r} must be one line")
    return text


def _no_spaces(text: str) -> str:
    if not text or re.search(r"\s", text):
        raise ValueError(f"{text!r} must be one word")
    return text


def _option(text: str) -> str:
    name = _one_line(text).strip().removeprefix("#SBATCH").strip().removeprefix("--").partition("=")[0].split()[0]
    if name in _OURS:
        raise ValueError(f"--{name} has a place of its own in the job file; see `ctpo slurm --help` for the option that sets it")
    return text.strip().removeprefix("#SBATCH").strip()


Word = Annotated[str, AfterValidator(_no_spaces)]
Line = Annotated[str, AfterValidator(_one_line)]


class Container(Section):
    """The image that everything runs in, by NVIDIA's pyxis and enroot. Packages outside of it are not used."""

    image: Word
    """As `srun --container-image` takes it: a registry's name, or the path of a .sqsh file."""
    mounts: tuple[Word, ...] = ()
    """`FROM:TO` each. Run directory, model and data must be mounted at the paths that the configuration names."""
    workdir: Word | None = None
    """Directory to start in; null: the image's own."""


class Site(Section):
    """Options of a cluster's jobs."""

    partition: Word | None = None
    """null: the cluster's default."""
    account: Word | None = None
    """null: yours."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that nodes must have."""
    reservation: Word | None = None
    """Name of a reservation."""
    time: Annotated[str, BeforeValidator(_time)] = "24:00:00"
    """Limit of one job, as sbatch takes it."""
    gpus_per_node: NonNegativeInt = 8
    """Of the partition's nodes. 0: a run on CPUs."""
    signal_lead: PositiveInt = 600
    """Seconds before the limit at which the run is asked to save and stop."""
    requeue: bool = True
    """Whether jobs may be requeued here. false: a job that was stopped in order submits one that follows it."""
    starts: PositiveInt = 3
    """So many starts without a newer checkpoint, one after the other, and the job does not go on by itself."""
    spare_nodes: NonNegativeInt = 0
    """Nodes that a job gets beside those that its run needs, to be used when one of them is lost."""
    preflight: bool = True
    """Whether each job checks its nodes before it starts."""
    exclusive: bool = True
    """Whether to ask for whole nodes, with all their CPUs and memory. false: `sbatch` has to say how much of both a job needs."""
    mail_user: Word | None = None
    """Address that SLURM writes to."""
    mail_type: Word = "FAIL,REQUEUE,END"
    """What it writes about."""
    container: Container | None = None
    """null: what is installed on the nodes."""
    modules: tuple[Word, ...] = ()
    """Modules that the job file loads."""
    environment: tuple[Line, ...] = ()
    """Lines of shell that the job file runs, after the modules."""
    sbatch: tuple[Annotated[str, AfterValidator(_option)], ...] = ()
    """Further options of sbatch: `--licenses=a`."""


def read_site(path: Path | None, given: dict[str, Any] | None = None) -> Site:
    """Returns the options in the YAML file at `path`, None for none, with those `given` on the command line on top.

    Raises ConfigError.
    """
    sources: list[Source] = [*([] if path is None else read_file(home_path(path))), Source(COMMAND_LINE, given or {})]
    values: dict[str, Any] = {}
    for source in sources:
        values = merge(values, source.values)
    main = str(path) if path is not None else COMMAND_LINE
    try:
        return Site.model_validate(resolve(values, main))
    except ValidationError as error:
        raise ConfigError(explain(error, sources, main, Site)) from error
