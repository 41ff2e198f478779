"""What a simulation is told besides the run's configuration: `ctpo plan CONFIG --simulate --with key=value`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.explain import explain
from ctpo_megatron.config.sources import COMMAND_LINE, read_overrides
from ctpo_megatron.errors import ConfigError


class SimulationOptions(Section):
    """Where speeds and lengths come from, what fails, and how long to simulate."""

    run: FilePath | None = None
    """Directory of a run that speeds are measured in: of the same model, tp, cp and pp, on the same kind of device. null: they
    are computed from a roofline of GPUs."""
    first: PositiveInt | None = None
    """Only so many of that run's first steps are measured. null: all."""
    warm_up: NonNegativeInt = 1
    """So many of its first steps are not measured."""
    lengths: FilePath | None = None
    """Directory of a run whose trajectories, or ledger, are drawn from. null: those of `run`, where `mean` is not given."""
    mean: PositiveFloat | None = None
    """Tokens of a response, log-normal. null: a quarter of rollout.max_response_tokens."""
    sigma: NonNegativeFloat = 0.8
    """Standard deviation of the logarithm of a response's length."""
    prompt_tokens: PositiveInt | None = None
    """Of a prompt, where lengths are log-normal or a ledger's. null: a quarter of data.max_prompt_tokens."""
    calls: NonNegativeInt = 0
    """Tool calls of an attempt, where lengths are log-normal."""
    tool_s: NonNegativeFloat | None = None
    """Seconds of a tool call. null: 0.3 beside GPUs, 0.015 on CPUs."""
    cores: PositiveFloat | None = None
    """Of a host that servers (one each), trainer and tools share, with a `run` of staleness 0: where they want more, all become
    slower. null: they do not, beyond what they were in that run."""
    trainer_cores: PositiveFloat | None = None
    """Of these, what the trainer keeps busy. null: all, as the ranks of a host share its cores among their threads."""
    steps: PositiveInt = 4
    """Steady steps; as many as rollouts run ahead come before and after them."""
    mtbf_hours: PositiveFloat | None = None
    """Mean hours that a server lives. null: none dies."""
    failing: float = Field(0.0, ge=0, lt=1)
    """Share of tries at an attempt that fail."""
    seed: NonNegativeInt = 0
    """Of lengths, failures and the order of prompts."""
    splits: bool = True
    """Whether other splits of the GPUs between trainer and servers are simulated too."""
    teraflops: PositiveFloat = 989.0
    """Of a GPU, dense, in the run's number format. Default: H100 in bfloat16."""
    terabytes_s: PositiveFloat = 3.35
    """Of a GPU's memory."""
    gigabytes_s: PositiveFloat = 20.0
    """Of weights that a sender gives to servers."""
    trained: float = Field(0.4, gt=0, le=1)
    """Share of `teraflops` that training reaches."""
    decoded: float = Field(0.6, gt=0, le=1)
    """Share of `terabytes_s` that decoding reaches."""
    json_file: FilePath | None = None
    """File that all numbers are written to. null: none."""


def read_options(words: list[str], *, asked: bool = True) -> SimulationOptions:
    """Returns the options that `words`, key=value each, give. Raises ConfigError, which names what is allowed.

    `asked`: whether there is to be a simulation; otherwise there must be no words.
    """
    if words and not asked:
        raise ConfigError("--with is about a simulation; give --simulate too.")
    source = read_overrides(words)
    try:
        options = SimulationOptions.model_validate(source.values)
    except ValidationError as error:
        raise ConfigError(explain(error, [source], COMMAND_LINE, SimulationOptions)) from error
    if options.json_file is not None and not Path(options.json_file).parent.is_dir():
        raise ConfigError(f"--with json_file={options.json_file}: its directory does not exist; make it, or name another file.")
    return options
