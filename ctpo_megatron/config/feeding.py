"""Which prompts training sees, and how often: mixtures of files, pools of one difficulty, curricula."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from ctpo_megatron.config.base import FilePath, Section

MAIN = "train"  # the name of data.train among the sources


class SourceConfig(Section):
    """A further file of prompts."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """What its prompts are called in the ledger, and what a curriculum calls it."""
    path: FilePath
    """Prompts, in the same form as data.train."""
    weight: PositiveFloat = 1.0
    """How often a prompt of it comes, relative to data.weight and the other sources' weights."""


class PoolsConfig(Section):
    """Pools of prompts of one difficulty in each source, drawn from by weights."""

    column: str | None = None
    """Column of the data with a number for each prompt. null: the share of right answers in this run so far, by which a prompt
    changes pools; prompts that were not tried yet have a pool of their own, the first."""
    borders: tuple[float, ...] = Field(min_length=1)
    """Numbers between neighbouring pools, ascending. A prompt is in the pool above a border that it reaches."""
    weights: tuple[NonNegativeFloat, ...]
    """How often a prompt of each pool comes, relative to the other pools of its source. One more than borders; without a column
    two more, the first for prompts that were not tried."""

    @model_validator(mode="after")
    def _weights_fit(self) -> PoolsConfig:
        if list(self.borders) != sorted(set(self.borders)):
            raise ValueError(f"data.pools.borders={list(self.borders)} do not ascend")
        needed = len(self.borders) + (1 if self.column else 2)
        if len(self.weights) != needed or not sum(self.weights):
            raise ValueError(
                f"data.pools.weights={list(self.weights)}; needed: {needed} numbers, one for each pool, and not all of them 0"
            )
        return self
