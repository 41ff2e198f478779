"""What a plan is made from: sections of a run's configuration, and where its processes are."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.model import ModelConfig, MoeConfig, ParallelConfig
from ctpo_megatron.config.rollout import DataConfig, RolloutConfig
from ctpo_megatron.config.train import OptimizerConfig, TrainConfig
from ctpo_megatron.config.weights import Transport
from ctpo_megatron.planning.topology import Topology

FORMAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run that is not started yet."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig
    moe: MoeConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    rollout: RolloutConfig
    weights: Transport
    topology: Topology

    @property
    def on_cpu(self) -> bool:
        """Whether it is to run on CPUs; `cluster.device: auto` is taken for GPUs."""
        return self.topology.device == "cpu"

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight and of an activation: as model.dtype says; `auto` is bfloat16 unless the run is on CPUs."""
        return FORMAT_BYTES[self.model.dtype_on("cpu" if self.on_cpu else "cuda")]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample: prompt and response at their limits."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens
