"""What a plan is made from: sections of a run's configuration, and where its processes are."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.model import ModelConfig, MoeConfig, ParallelConfig
from ctpo_megatron.config.rollout import DataConfig, RolloutConfig
from ctpo_megatron.config.train import OptimizerConfig, TrainConfig
from ctpo_megatron.config.weights import Transport
from ctpo_megatron.planning.topology import Topology

# of `batch.TokenStreams`, which needs torch; a test holds them equal
STREAM_BYTES = 3 * 8 + 2 * 1 + 3 * 4  # ids, labels, positions; mask, restarts; advantages, log-probs, versions
TOP_K_BYTES = 4 + 4 + 4  # a token's id, and its log-prob under either policy
LOGP_BYTES = 4
REWARD_BYTES = 4
VALUE_BYTES = 3 * 4
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
    has_reference: bool  # log-probs of a reference policy are computed
    has_teachers: bool  # so are those of teachers
    copied_teachers: int  # how many of these are in the trainer's ranks
    host_copies: int  # other weights that wait in each rank's host memory: of a reference policy, of copied teachers
    keeps_copies: bool  # copies of the trainer's state are kept in hosts' memory
    has_critic: bool  # a value head learns
    top_k: int  # tokens at each place whose log-probs are recorded, or that could have been drawn

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of a micro-batch on a rank, without the record of routing: `batch.TokenStreams`, as it is packed."""
        return STREAM_BYTES + self.top_k * TOP_K_BYTES + (REWARD_BYTES if self.has_critic else 0)

    @property
    def kept_token_bytes(self) -> int:
        """Bytes of one token that stay on the device from the old policy's pass to the token's optimizer step: log-probs, and
        with a critic the old value, the return and the advantage."""
        return LOGP_BYTES * (1 + self.has_reference + self.has_teachers) + (VALUE_BYTES if self.has_critic else 0)

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
