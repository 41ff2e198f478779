"""The whole configuration of a run, and the rules that reach across its sections."""

from __future__ import annotations

from pydantic import NonNegativeInt, model_validator

from ctpo_megatron.config.alarms import AlarmsConfig
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.base import FilePath, Section
from ctpo_megatron.config.cluster import ClusterConfig
from ctpo_megatron.config.elastic import ElasticConfig, as_written, changed_layouts, layout_key
from ctpo_megatron.config.evaluation import EvalConfig
from ctpo_megatron.config.feeding import MAIN
from ctpo_megatron.config.model import ModelConfig, MoeConfig, ParallelConfig
from ctpo_megatron.config.record import DriftConfig, LogConfig
from ctpo_megatron.config.rollout import DataConfig, RolloutConfig
from ctpo_megatron.config.sft import SftConfig
from ctpo_megatron.config.sglang_options import options
from ctpo_megatron.config.trace import TraceConfig
from ctpo_megatron.config.train import CheckpointConfig, OptimizerConfig, TrainConfig
from ctpo_megatron.config.weights import AttestConfig, BroadcastTransport, Transport
from ctpo_megatron.errors import ConfigError

FP8_TOKEN = 1.0  # by which log-probs of single tokens may differ between servers in fp8 and the trainer, docs/precision.md


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
    elastic: ElasticConfig = ElasticConfig()
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
    alarms: AlarmsConfig = AlarmsConfig()
    trace: TraceConfig = TraceConfig()

    @model_validator(mode="after")
    def _batches_divide(self) -> RunConfig:
        train, samples = self.train, self.train.prompts_per_step * self.rollout.group_size
        if train.prompts_per_step % train.optimizer_steps:
            raise ValueError(
                f"train.optimizer_steps={train.optimizer_steps} does not divide train.prompts_per_step={train.prompts_per_step}"
            )
        _check_replicas(self.parallel, samples // train.optimizer_steps)
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
    def _a_critic_is_part_of_a_whole_model(self) -> RunConfig:
        if self.algorithm.gae is None:
            return self
        if self.model.adapter is not None:
            raise ValueError(
                "algorithm.advantage.type=gae trains a value head beside all weights, and model.adapter trains adapters alone; "
                "set model.adapter to null, or take another advantage: group, rloo, reinforce++ or tempo"
            )
        if self.rollout.dynamic.max_refills:
            raise ValueError(
                f"rollout.dynamic.max_refills={self.rollout.dynamic.max_refills} replaces groups whose rewards are all equal, "
                "but with algorithm.advantage.type=gae these teach as well, and a critic that never sees them expects too "
                "little or too much; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _longest_sequence_fits(self) -> RunConfig:
        _check_length(self.parallel, self._longest, self.train.max_tokens_per_micro_batch)
        return self

    @model_validator(mode="after")
    def _divergences_are_of_whole_distributions(self) -> RunConfig:
        if self.algorithm.top_k and self.rollout.truncation.cuts:
            band = getattr(self.algorithm.objective, "band", None)
            key, value = ("band", band) if band else ("divergence", getattr(self.algorithm.objective, "divergence", ""))
            other = "variance or entropy" if band else "binary_tv or binary_kl"
            raise ValueError(
                f"algorithm.objective.{key}={value} looks at whole distributions, but rollout.top_k, top_p or min_p truncate "
                f"what is sampled; use {other}, or leave these out"
            )
        return self

    @model_validator(mode="after")
    def _teachers_can_teach(self) -> RunConfig:
        distillation, rollout = self.algorithm.distillation, self.rollout
        if distillation is None:
            return self
        distillation.check_sources([MAIN, *(source.name for source in self.data.mixture)])
        if rollout.dynamic.max_refills and not distillation.objective_coeff:
            raise ValueError(
                f"rollout.dynamic.max_refills={rollout.dynamic.max_refills} replaces groups whose rewards are all equal, but "
                "with algorithm.distillation.objective_coeff=0 they teach as much as others; set max_refills=0"
            )
        for teacher in distillation.asked.values():
            if rollout.temperature != 1 or rollout.truncation.cuts:
                cut = "rollout.top_k" if rollout.truncation.cuts else f"rollout.temperature={rollout.temperature:g}"
                raise ValueError(
                    f"algorithm.distillation: SGLang gives the log-probs of teacher {teacher.name!r} at temperature 1 and of "
                    f"whole distributions, but {cut} has other ones sampled; use temperature 1 without top_k, top_p and min_p, "
                    "or a teacher of type copied"
                )
        return self

    @model_validator(mode="after")
    def _smaller_layouts_work(self) -> RunConfig:
        layouts = changed_layouts(self.parallel, self.elastic.layouts)
        if layouts and self.weights.within_node:
            raise ValueError(
                f"{layout_key(0)}: weights.type={self.weights.type} keeps trainer and servers together on one node, so there is "
                "nothing to go on with when it is lost; set elastic.layouts=[], or weights.type=broadcast"
            )
        samples = self.train.prompts_per_step * self.rollout.group_size // self.train.optimizer_steps
        for index, (changes, layout) in enumerate(zip(self.elastic.layouts, layouts, strict=True)):
            try:
                _check_replicas(layout, samples)
                _check_length(layout, self._longest, self.train.max_tokens_per_micro_batch)
            except ValueError as error:
                raise ValueError(as_written(str(error), index, changes)) from error
        return self

    @model_validator(mode="after")
    def _attention_shares_prompts(self) -> RunConfig:
        if self.cluster.device == "cuda" and (fault := self._shared_prompts_fault):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _traced_ranks_are_there(self) -> RunConfig:
        self.trace.check(self.parallel.world_size, self.cluster.device)
        return self

    @model_validator(mode="after")
    def _micro_batches_suit_fp8(self) -> RunConfig:
        most, layouts = self.train.max_tokens_per_micro_batch, self.layouts if self.train.fp8 is not None else []
        for layout in layouts:
            if most % (multiple := self.train.token_multiple * layout.tp):
                raise ValueError(
                    f"train.max_tokens_per_micro_batch={most} is no multiple of {multiple}, as train.fp8 wants it with "
                    f"parallel.tp={layout.tp}: a rank's products are over multiples of {self.train.token_multiple} tokens"
                )
        return self

    @model_validator(mode="after")
    def _servers_may_differ_from_the_trainer(self) -> RunConfig:
        if self.weights.quantization is None:
            return self
        counted = self.algorithm.correction is not None or "rollout" in (self.algorithm.anchor, self.algorithm.objective.anchor)
        if self.drift.mean == "auto" and not counted:
            raise ValueError(
                f"weights.quantization={self.weights.quantization}: servers sample from a policy not quite the trainer's, "
                "and ratios against the trainer's own log-probs leave that out. Set algorithm.correction (type=truncate, "
                "level=token, for example), or say by a drift.mean of your own, a number or null, that it may be left out "
                "(docs/precision.md)"
            )
        if self.drift.max is not None and self.drift.max < FP8_TOKEN:
            raise ValueError(
                f"weights.quantization={self.weights.quantization} with drift.max={self.drift.max:g}: single log-probs differ by "
                f"more than {FP8_TOKEN:g} between servers in fp8 and the trainer; set drift.max to null, or above that "
                "(docs/precision.md)"
            )
        return self

    @model_validator(mode="after")
    def _drafts_keep_their_weights(self) -> RunConfig:
        given = {each.name for each in options(self.rollout.engine.extra_args)}
        drafts = sorted(name for name in given if name.startswith("speculative"))
        if self.weights.quantization is not None and drafts:
            raise ValueError(
                f"rollout.engine.extra_args has --{drafts[0]} beside weights.quantization={self.weights.quantization}: servers "
                "start with random weights in fp8, draft models too, and nothing is published to these. Speculation without a "
                "draft model was not tried with it; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _number_formats_are_there(self) -> RunConfig:
        known = self.cluster.device != "auto" or self.model.dtype == "float32"
        if known and (fault := self._number_format_fault(self.cluster.device)):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _an_offloaded_optimizer_is_of_bfloat16(self) -> RunConfig:
        if self.optimizer.cpu_offload and self.model.dtype == "float32":
            raise ValueError(
                f"optimizer.cpu_offload={self.optimizer.cpu_offload:g} is for weights in bfloat16: megatron-core 0.16.1 cannot "
                "build an offloaded optimizer of float32 ones; set model.dtype=bfloat16, or optimizer.cpu_offload=0"
            )
        return self

    def check_device(self, device: str) -> None:
        """Raise ConfigError for what cannot work on `device`, cpu or cuda, now that it is known to be the one."""
        fault = self._number_format_fault(device) or (self._shared_prompts_fault if device == "cuda" else "")
        if fault:
            raise ConfigError(fault)

    @property
    def _shared_prompts_fault(self) -> str:
        """Returns why samples on GPUs cannot share prompts as asked; empty where nobody asks."""
        if self.train.share_from is None:
            return ""
        return (
            f"train.share_prompts={self.train.share_from} needs cluster.device=cpu, and it is cuda: TransformerEngine's "
            "attention reads no prompt for several sequences; set train.share_prompts to auto or null"
        )

    def _number_format_fault(self, device: str) -> str:
        """Returns why products on `device` cannot be in fp8 as asked, of the trainer or the servers; empty where they can."""
        fp8, dtype = self.train.fp8, self.model.dtype_on(device)
        if fp8 is not None and device == "cpu":
            return (
                f"train.fp8.recipe={fp8.recipe} needs GPUs and TransformerEngine; the trainer's layers on a CPU are plain torch, "
                "and would compute as before. Set train.fp8=null"
            )
        if dtype == "bfloat16":
            return ""
        beside = f"with model.dtype={self.model.dtype}, which is {dtype} here; set model.dtype=bfloat16, or"
        if self.weights.quantization is not None:
            return (
                f"weights.quantization={self.weights.quantization}: beside weights in fp8 SGLang computes in bfloat16 only, not "
                f"{beside} weights.quantization=null"
            )
        return "" if fp8 is None else f"train.fp8 is for weights in bfloat16, not {beside} train.fp8=null"

    @property
    def without_trainer(self) -> RunConfig:
        """Returns this configuration where nothing is trained or published: servers keep the weights of a model's files."""
        weights = self.weights.model_copy(update={"quantization": None})
        train = self.train.model_copy(update={"fp8": None, "staleness": 0, "oversample": 0})
        return self.model_copy(update={"weights": weights, "train": train, "eval": self.eval.model_copy(update={"servers": 0})})

    @property
    def servers_alone(self) -> bool:
        """Returns whether nothing else of the run computes while its servers generate.

        So it is where the trainer waits for samples, or there is none. Servers that only evaluate do so while it trains, and the
        servers of teachers read samples while others are generated.
        """
        teaching = self.algorithm.distillation
        return not (self.train.staleness or self.eval.servers or (teaching is not None and teaching.started))

    @property
    def layouts(self) -> list[ParallelConfig]:
        """Returns the layouts that the trainer may have: `parallel`, and the smaller ones in their order."""
        return [self.parallel, *changed_layouts(self.parallel, self.elastic.layouts)]

    def in_layout(self, parallel: ParallelConfig) -> RunConfig:
        """Returns this configuration with the trainer in the layout `parallel`, and no other one beside it."""
        return self.model_copy(update={"parallel": parallel, "elastic": ElasticConfig()})

    def absence_s(self, *, trained: bool = True) -> float:
        """Returns seconds for which no server may serve though all is well: a start, a publication and, if `trained`, a step."""
        engine = self.rollout.engine
        return engine.start_timeout_s + self.weights.timeout_s + (self.cluster.call_timeout_s if trained else 0.0)

    @property
    def _longest(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

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

    @model_validator(mode="after")
    def _servers_are_left_to_train_with(self) -> RunConfig:
        aside, servers = self.eval.servers, self.rollout.engine.servers
        if aside and aside >= servers:
            raise ValueError(
                f"eval.servers={aside} leaves none of rollout.engine.servers={servers} to train with; set more of these, or "
                "eval.servers=0, with which training stands still for an evaluation"
            )
        if aside and self.weights.servers_sleep:
            raise ValueError(
                f"eval.servers={aside}, but with weights.type=colocated all servers give back their memory while the trainer "
                "trains; set eval.servers=0, or weights.release=false if there is room for both"
            )
        return self


def _check_replicas(parallel: ParallelConfig, samples: int) -> None:
    """Raises ValueError where there are more replicas than `samples` of an optimizer step."""
    if samples < parallel.dp:
        raise ValueError(
            f"parallel.dp={parallel.dp} needs at least that many samples per optimizer step; "
            f"train.prompts_per_step * rollout.group_size / train.optimizer_steps = {samples}"
        )


def _check_length(parallel: ParallelConfig, longest: int, per_rank: int) -> None:
    """Raises ValueError where the longest sample is longer than a micro-batch of `per_rank` tokens on each rank."""
    if longest > per_rank * parallel.cp:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} does not fit into one micro-batch: "
            f"train.max_tokens_per_micro_batch * parallel.cp = {per_rank * parallel.cp}"
        )
