"""What is trained instead of a model's own weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from ctpo_megatron.config.base import FilePath, Section

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(Section):
    """Low-rank adapters, arXiv 2106.09685: W x + s B (A x), of which only A and B are trained; docs/adapters.md."""

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Rows of A, columns of B."""
    alpha: PositiveFloat = 32.0
    """s is alpha / rank."""
    use_rslora: bool = False
    """s is alpha / sqrt(rank) instead, arXiv 2312.03732."""
    use_dora: bool = False
    """DoRA, arXiv 2402.09353: the lengths of the rows of W + s B A are numbers of their own, m, and trained as well. Not of
    experts."""
    targets: tuple[Target, ...] = Field(TARGETS, min_length=1)
    """Projections that have an adapter, in every layer; those of a mixture of experts in every expert."""
    path: FilePath | None = None
    """Directory in peft's format (adapter_config.json, adapter_model.safetensors) that training begins with. null: A is drawn by
    `seed`, B is 0."""

    @property
    def scale(self) -> float:
        """Returns s."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """In one order, whatever the order in which they are written."""
        if len(set(targets)) < len(targets):
            raise ValueError(f"{', '.join(targets)} has a projection twice; name each once")
        return tuple(target for target in TARGETS if target in targets)
