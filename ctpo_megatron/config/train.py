"""The trainer: optimizer, batch sizes, checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from ctpo_megatron.config.base import Section
from ctpo_megatron.config.memory import MemoryConfig
from ctpo_megatron.config.spikes import SpikeConfig
from ctpo_megatron.errors import ConfigError

NO_MUON = (
    "muon is not available: megatron-core 0.16.1 takes it from the package emerging_optimizers, whose release 0.3.0 asks for "
    "Python 3.12 or newer, and refuses it together with the distributed optimizer, which this trainer uses; allowed: adamw"
)


class OptimizerConfig(Section):
    """AdamW with a linear warm-up of the learning rate and a schedule after it."""

    type: Literal["adamw"] = "adamw"
    """Which optimizer. Muon is refused by name with the reason (docs/choosing.md)."""
    lr: NonNegativeFloat = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "inverse-square-root", "wsd"] = "constant"
    """After the warm-up. cosine and linear fall to min_lr over the run; wsd stays and falls in its last wsd_decay_steps."""
    min_lr: NonNegativeFloat = 0.0
    """Where the rate falls to; without effect on constant."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    wsd_decay_steps: PositiveInt | None = None
    """Optimizer steps of the fall at the end of wsd."""
    wsd_decay: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Shape of that fall."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay per step, times the learning rate."""
    clip_grad: PositiveFloat = 1.0
    """Largest norm of the gradient; above it the gradient is scaled down."""
    precision_aware: bool = False
    """Keep the moments in the formats below. Needs a GPU, TransformerEngine and bfloat16 weights."""
    exp_avg_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the first moment; other than float32 needs precision_aware."""
    exp_avg_sq_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the second moment; other than float32 needs precision_aware."""
    cpu_offload: float = Field(0.0, ge=0, le=1)
    """Fraction of the optimizer's state that is kept and updated in the host's memory. More than 0 needs a GPU,
    TransformerEngine and weights in bfloat16."""

    @field_validator("type", mode="before")
    @classmethod
    def _muon_is_refused_by_name(cls, value: object) -> object:
        if isinstance(value, str) and "muon" in value.lower():
            raise ValueError(NO_MUON)
        return value

    @model_validator(mode="after")
    def _rates_and_formats_agree(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if (self.schedule == "wsd") != (self.wsd_decay_steps is not None):
            raise ValueError("schedule=wsd and wsd_decay_steps go together; give both or neither")
        formats = {self.exp_avg_dtype, self.exp_avg_sq_dtype}
        if not self.precision_aware and formats != {"float32"}:
            raise ValueError("exp_avg_dtype and exp_avg_sq_dtype other than float32 need precision_aware=true")
        if self.precision_aware and self.cpu_offload:
            raise ValueError("precision_aware and cpu_offload exclude each other; moments in the host's memory are float32")
        return self

    def check_length(self, total_steps: int | None) -> None:
        """Raise ConfigError for a schedule that has to end and does not fit into `total_steps` optimizer steps; None: endless."""
        if self.schedule not in ("cosine", "linear", "wsd"):
            return
        needed = self.warmup_steps + (self.wsd_decay_steps or 0)
        if total_steps is not None and total_steps >= needed:
            return
        parts = f"optimizer.warmup_steps = {self.warmup_steps}"
        parts += f" and optimizer.wsd_decay_steps = {self.wsd_decay_steps}" if self.wsd_decay_steps else ""
        raise ConfigError(
            f"optimizer.schedule is {self.schedule} with {parts}, but the run has {total_steps} optimizer steps; "
            f"it needs at least {needed}."
        )


class Fp8Config(Section):
    """Matrix products of layers in fp8, by Megatron-Core and TransformerEngine (docs/precision.md). Weights, and what is
    published, stay in bfloat16. Refused on CPUs, without TransformerEngine and on GPUs that cannot."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
    """How scales are found, and the least compute capability: delayed from the steps before (8.9), tensorwise from the tensor
    itself (8.9), blockwise for each 128 x 128 of a weight and 1 x 128 of an activation (9.0), mxfp8 for 32 numbers (10.0)."""
    format: Literal["e4m3", "hybrid"] | None = None
    """hybrid: e5m2 for gradients of activations, e4m3 for all else. null: hybrid for delayed and tensorwise, else e4m3."""
    bf16_layers_at_start: NonNegativeInt = 0
    """So many of the first layers stay in bfloat16; not with delayed."""
    bf16_layers_at_end: NonNegativeInt = 0
    """So many of the last layers stay in bfloat16; not with delayed."""

    @property
    def number_format(self) -> Literal["e4m3", "hybrid"]:
        """`format`, where it is not given the recipe's own."""
        return self.format or ("hybrid" if self.recipe in ("delayed", "tensorwise") else "e4m3")

    @property
    def token_multiple(self) -> int:
        """What the tokens that a rank's products are over have to be a multiple of."""
        return {"blockwise": 128, "mxfp8": 32}.get(self.recipe, 16)

    @model_validator(mode="after")
    def _layers_can_stay(self) -> Fp8Config:
        if self.recipe == "delayed" and (self.bf16_layers_at_start or self.bf16_layers_at_end):
            raise ValueError(
                "train.fp8: recipe=delayed knows no layers in bfloat16; take recipe=tensorwise, or leave 0 at both ends"
            )
        return self


class TrainConfig(Section):
    """How trajectories become optimizer steps."""

    steps: PositiveInt = 100
    """Rollout batches to train on."""
    prompts_per_step: PositiveInt = 32
    """Prompts of one rollout batch; each is sampled rollout.group_size times."""
    optimizer_steps: PositiveInt = 4
    """Optimizer steps per rollout batch; must divide prompts_per_step."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Tokens of one forward-backward pass on each rank; a micro-batch that cp ranks share holds cp times as many."""
    balance: Literal["tokens", "flops"] = "tokens"
    """What the data-parallel ranks get equal shares of. flops: attention's square of the length counts too."""
    staleness: NonNegativeInt = 0
    """How many versions old the policy of a rollout may be when it is trained on. 0: strictly synchronous."""
    oversample: NonNegativeInt = 0
    """Groups in flight beyond prompts_per_step: a step takes the first prompts_per_step that are finished, and the others go on
    in the next step. Rollouts then run ahead of training by one version less than staleness, which has to be at least 1."""
    spare: bool = True
    """Samples whose advantage is zero at every token, as in groups of equal rewards, get no forward and backward pass, unless
    another term of the loss wants one (docs/passes.md). They count in the loss's means, not in the statistics of training."""
    share_prompts: PositiveInt | Literal["auto"] | None = "auto"
    """Samples of a group read the tokens that all of them begin with once, where these are at least so many (docs/passes.md). On
    CPUs, for dense models with heads. auto: from 16 tokens on there, and nowhere else; null: each reads its own."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass. selective: inside attention, and where it pays inside experts; full: of
    whole layers."""
    fp8: Fp8Config | None = None
    """Matrix products of the trainer's layers in fp8. null: in the model's number format."""
    nonfinite_limit: PositiveInt = 3
    """Training steps in a row with a loss or gradient that is not finite, at which the run stops. Such an optimizer step is not
    applied, the rest of its training step is left out, and the run goes on until then. 1: stop at the first."""
    nonfinite_dumps: NonNegativeInt = 4
    """How many dumps of such steps are kept in RUN_DIR/dumps, the newest; each holds the weights too. 0: none is written."""
    spikes: SpikeConfig = SpikeConfig()

    @property
    def share_from(self) -> int | None:
        """From how many common tokens on prompts are read once; None: each sample reads its own, as where auto is undecided."""
        return None if self.share_prompts == "auto" else self.share_prompts

    @property
    def token_multiple(self) -> int:
        """What each rank's share of a micro-batch's tokens has to be a multiple of."""
        return 1 if self.fp8 is None else self.fp8.token_multiple


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegativeInt = 0
    """Save after every so many steps. 0: never."""
    keep: PositiveInt = 2
    """How many verified checkpoints to keep."""
    on_stop: bool = True
    """Save when the run is asked to stop, also where `every` is 0."""
    journal: Literal["none", "needed", "all"] = "needed"
    """What is sampled is kept in RUN_DIR/journal, so that a run that goes on samples nothing a second time. needed: until the
    oldest checkpoint holds what was learned from it; all: for good, so that the whole run can be trained once more."""
    storage_wait_s: NonNegativeFloat = 1800.0
    """How long the run waits, with all it has in memory, while its disk is full, read-only or stale, or its directory is away. 0:
    the first write that fails ends the run."""
    background: bool = True
    """Write and verify while training goes on; each rank then holds a second copy of its part in host memory meanwhile."""
    memory: MemoryConfig = MemoryConfig()
    export: bool = True
    """Write the final weights in Hugging Face format to RUN_DIR/model."""
