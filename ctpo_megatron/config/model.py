"""The model and how it is spread over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from ctpo_megatron.config.base import Section


class ModelConfig(Section):
    """A model in Hugging Face format."""

    path: str
    """Directory with config.json, *.safetensors and the tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of training and generation. auto: bfloat16 on GPUs, float32 on a CPU."""


class ParallelConfig(Section):
    """Sizes of the trainer's parallel axes. World size = tp * pp * cp * dp."""

    tp: PositiveInt = 1
    """Tensor parallel; sequence parallelism comes with it."""
    pp: PositiveInt = 1
    """Pipeline parallel."""
    cp: PositiveInt = 1
    """Context parallel, zigzag layout."""
    ep: PositiveInt = 1
    """Expert parallel; must divide tp * cp * dp."""
    dp: PositiveInt = 1
    """Data parallel."""

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @model_validator(mode="after")
    def _experts_divide(self) -> ParallelConfig:
        ranks = self.tp * self.cp * self.dp
        if ranks % self.ep:
            raise ValueError(f"ep={self.ep} does not divide tp*cp*dp={ranks}; allowed: divisors of {ranks}")
        return self
