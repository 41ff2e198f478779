"""What a model is evaluated on, how its answers are sampled, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, StringConstraints, field_validator

from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.rollout import DataConfig, RolloutConfig

HELD_OUT = "held_out"  # what the file of `data.eval` is called
BenchmarkName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # part of file and metric names

Samples = Annotated[int, Field(gt=0, le=1024)]  # binomial coefficients of more do not fit into a float64


class BenchmarkConfig(Section):
    """One benchmark, by its name. A key that is null has the value of the same key of `eval`."""

    file: FilePath
    """Its problems, a file like that of data.eval."""
    every: NonNegativeInt | None = None
    """Evaluate on it after every so many steps, besides before the first and after the last. 0: only these two."""
    prompts: PositiveInt | None = None
    """Use the first so many rows. null here and in `eval`: all."""
    samples: Samples | None = None
    """Attempts at each problem: n of avg@n, and the largest k of pass@k and maj@k."""
    temperature: NonNegativeFloat | None = None
    """0: greedy."""
    max_turns: PositiveInt | None = None
    """Assistant turns per attempt."""
    max_response_tokens: PositiveInt | None = None
    """Tokens after the prompt, tool output included."""


class EvalConfig(Section):
    """Evaluation on data.eval and on benchmarks. docs/evaluation.md explains what is measured, and where it stands."""

    every: NonNegativeInt = 0
    """Evaluate after every so many steps, besides before the first and after the last. 0: only these two."""
    prompts: PositiveInt | None = None
    """Use the first so many rows of a file. null: all."""
    samples: Samples = 1
    """Attempts at each problem; accuracy is their mean, avg@n."""
    temperature: NonNegativeFloat = 0.0
    """0: greedy."""
    max_turns: PositiveInt | None = None
    """Assistant turns per attempt. null: as in `rollout`."""
    max_response_tokens: PositiveInt | None = None
    """Tokens after the prompt, tool output included. null: as in `rollout`."""
    benchmarks: dict[BenchmarkName, BenchmarkConfig] = Field({})
    """Files to evaluate on besides data.eval, each under its name."""
    servers: NonNegativeInt = 0
    """Of rollout.engine.servers, so many keep the weights that are evaluated while training goes on with the others. 0: training
    stands still for an evaluation. Before the first step and after the last one nothing is trained, and all servers evaluate."""

    @field_validator("benchmarks")
    @classmethod
    def _names_are_free(cls, benchmarks: dict[str, BenchmarkConfig]) -> dict[str, BenchmarkConfig]:
        if HELD_OUT in benchmarks:
            raise ValueError(f"{HELD_OUT!r} is what the file of data.eval is called; choose another name")
        return benchmarks


@dataclass(frozen=True, slots=True)
class BenchmarkSettings:
    """One benchmark with everything decided."""

    name: str
    file: str
    every: int
    prompts: int | None  # None: all
    samples: int
    temperature: float
    max_turns: int
    max_response_tokens: int

    def due(self, step: int, last: int) -> bool:
        """Whether the policy after `step` of `last` training steps is evaluated on it."""
        return step in (0, last) or (self.every > 0 and step % self.every == 0)


def benchmarks_of(data: DataConfig, config: EvalConfig, rollout: RolloutConfig) -> list[BenchmarkSettings]:
    """Returns all that is evaluated on: the file of data.eval, then the benchmarks as they are written."""
    held_out = {} if data.eval is None else {HELD_OUT: BenchmarkConfig(file=data.eval)}
    return [_decided(name, each, config, rollout) for name, each in (held_out | config.benchmarks).items()]


def _decided(name: str, own: BenchmarkConfig, config: EvalConfig, rollout: RolloutConfig) -> BenchmarkSettings:
    turns = config.max_turns if own.max_turns is None else own.max_turns
    tokens = config.max_response_tokens if own.max_response_tokens is None else own.max_response_tokens
    return BenchmarkSettings(
        name=name,
        file=own.file,
        every=config.every if own.every is None else own.every,
        prompts=config.prompts if own.prompts is None else own.prompts,
        samples=config.samples if own.samples is None else own.samples,
        temperature=config.temperature if own.temperature is None else own.temperature,
        max_turns=rollout.max_turns if turns is None else turns,
        max_response_tokens=rollout.max_response_tokens if tokens is None else tokens,
    )
