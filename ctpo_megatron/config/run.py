"""The whole configuration of a run, and the rules that reach across its sections."""

from __future__ import annotations

from pydantic import NonNegativeInt, model_validator

from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.cluster import ClusterConfig
from ctpo_megatron.config.model import ModelConfig, MoeConfig, ParallelConfig
from ctpo_megatron.config.record import DriftConfig, LogConfig
from ctpo_megatron.config.rollout import DataConfig, EvalConfig, RolloutConfig
from ctpo_megatron.config.train import CheckpointConfig, OptimizerConfig, SftConfig, TrainConfig
from ctpo_megatron.config.weights import AttestConfig, BroadcastTransport, Transport


class RunConfig(Section):
    """One run: `ctpo sft`, `ctpo train` and `ctpo eval` all read this."""

    name: str
    """Name of the run; its directory is run_dir."""
    run_dir: FilePath
    """Everything the run writes. Survives resuming."""
    seed: NonNegativeInt = 1
    """Seed of the order of prompts and of sampling."""
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    moe: MoeConfig = MoeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    eval: EvalConfig = EvalConfig()
    weights: Transport = BroadcastTransport()
    """How they reach the servers; `type` picks the transport."""
    attest: AttestConfig = AttestConfig()
    drift: DriftConfig = DriftConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> RunConfig:
        train, samples = self.train, self.train.prompts_per_step * self.rollout.group_size
        if train.prompts_per_step % train.optimizer_steps:
            raise ValueError(
                f"train.optimizer_steps={train.optimizer_steps} does not divide train.prompts_per_step={train.prompts_per_step}"
            )
        per_step = samples // train.optimizer_steps
        if per_step < self.parallel.dp:
            raise ValueError(
                f"parallel.dp={self.parallel.dp} needs at least that many samples per optimizer step; "
                f"train.prompts_per_step * rollout.group_size / train.optimizer_steps = {per_step}"
            )
        return self

    @model_validator(mode="after")
    def _groups_that_go_on_are_not_too_old(self) -> RunConfig:
        train = self.train
        if train.oversample and not train.staleness:
            raise ValueError(
                f"train.oversample={train.oversample} lets groups go on into the next step, where they are one version old; set "
                "train.staleness to 1 or more"
            )
        if train.oversample > train.prompts_per_step:
            raise ValueError(
                f"train.oversample={train.oversample} groups that go on do not fit into the next step; allowed: at most "
                f"train.prompts_per_step={train.prompts_per_step}"
            )
        if self.rollout.dynamic.max_refills and self.rollout.group_size == 1:
            raise ValueError(
                "rollout.dynamic.max_refills replaces groups whose rewards are all equal, which every group of "
                "rollout.group_size=1 is; set one of them otherwise"
            )
        return self

    @model_validator(mode="after")
    def _longest_sequence_fits(self) -> RunConfig:
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if longest > self.train.max_tokens_per_micro_batch * self.parallel.cp:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} does not fit into one micro-batch: "
                f"train.max_tokens_per_micro_batch * parallel.cp = {self.train.max_tokens_per_micro_batch * self.parallel.cp}"
            )
        return self

    @model_validator(mode="after")
    def _servers_stay_where_weights_reach_them(self) -> RunConfig:
        if self.weights.within_node and self.rollout.engine.nodes > 1:
            raise ValueError(
                f"rollout.engine.nodes={self.rollout.engine.nodes}, but weights.type=colocated hands weights over within a node; "
                "use weights.type=broadcast"
            )
        return self

    @model_validator(mode="after")
    def _sleeping_servers_do_nothing_else(self) -> RunConfig:
        if self.weights.servers_sleep and self.train.staleness:
            raise ValueError(
                f"train.staleness={self.train.staleness} samples while the trainer trains, but with weights.type=colocated the "
                "servers have given back their memory then; set train.staleness=0, or weights.release=false if there is room for "
                "both"
            )
        if self.weights.servers_sleep and self.weights.delta:
            raise ValueError(
                "weights.delta=true sends what has changed, but with weights.type=colocated the servers give back the memory of "
                "all weights; set weights.delta=false, or weights.release=false if there is room for both"
            )
        return self
