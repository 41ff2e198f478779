"""The model and how it is spread over ranks."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from ctpo_megatron.config.adapter import LoraConfig
from ctpo_megatron.config.base import FilePath, Section


class ChatConfig(Section):
    """How conversations become tokens, where the model's own files do not say it or are not to be followed."""

    chat_template: str | None = None
    """A chat template: a file of Jinja, or the template itself. null: the model's own. Base models often have none."""
    chat_options: dict[str, bool | int | float | str] = Field({})
    """Variables that the template knows, such as `enable_thinking: false`. One that it does not mention is refused."""
    chat_date: date | None = None
    """The day, as 2026-01-31, that the template takes for today. A template that asks for the date is refused without it, since
    the same prompt would have other tokens tomorrow."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a turn, such as "<|im_end|>", beside those that the model's own files name. Base models often name only
    the end of a text."""


class ModelConfig(ChatConfig):
    """A model in Hugging Face format."""

    path: FilePath
    """Directory with config.json, *.safetensors and the tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of training and generation. auto: bfloat16 on GPUs, float32 on a CPU."""
    adapter: LoraConfig | None = None
    """Train adapters of the model, which itself stays as it is; docs/adapters.md. null: train all weights."""

    def dtype_on(self, device: str) -> str:
        """`dtype` on a cpu or cuda device: never auto."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device == "cuda" else "float32"


class ParallelConfig(Section):
    """Sizes of the trainer's parallel axes. World size = tp * pp * cp * dp."""

    tp: PositiveInt = 1
    """Tensor parallel; sequence parallelism comes with it."""
    pp: PositiveInt = 1
    """Pipeline parallel."""
    vpp: PositiveInt = 1
    """Model chunks per pipeline stage: more than 1 interleaves them, which shortens the pipeline's bubble. Every optimizer step
    then has a multiple of pp micro-batches."""
    first_stage_layers: PositiveInt | None = None
    """Layers of the first pipeline stage, where it has more or fewer than the others. null: an equal share."""
    last_stage_layers: PositiveInt | None = None
    """Layers of the last pipeline stage, where it has more or fewer than the others. null: an equal share."""
    cp: PositiveInt = 1
    """Context parallel, zigzag layout."""
    ep: PositiveInt = 1
    """Expert parallel; ep * etp must divide tp * cp * dp."""
    etp: PositiveInt = 1
    """Tensor parallel of the experts."""
    dp: PositiveInt = 1
    """Data parallel."""
    overlap_grad_reduce: bool | None = None
    """Add up the gradients of data- and context-parallel ranks while the last micro-batch's backward pass goes on. null: where
    the model is dense, as only then it can."""
    overlap_param_gather: bool | None = None
    """Gather the weights that one optimizer step has moved while the next one's forward pass goes on, where a batch has several.
    null: where gradients are added up so, but for adapters, which cannot."""

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @model_validator(mode="after")
    def _experts_divide(self) -> ParallelConfig:
        ranks = self.tp * self.cp * self.dp
        if ranks % (self.ep * self.etp):
            raise ValueError(f"ep*etp={self.ep * self.etp} does not divide tp*cp*dp={ranks}; allowed: divisors of {ranks}")
        return self

    @model_validator(mode="after")
    def _stages_need_a_pipeline(self) -> ParallelConfig:
        if self.pp > 1:
            return self
        if self.vpp > 1:
            raise ValueError(f"vpp={self.vpp} interleaves the stages of a pipeline, but pp=1 has one; allowed: vpp=1, or pp>1")
        for name in ("first_stage_layers", "last_stage_layers"):
            if (layers := getattr(self, name)) is not None:
                raise ValueError(f"{name}={layers} splits a pipeline, but pp=1 has only one stage; allowed: null, or pp>1")
        return self


class MoeConfig(Section):
    """Training of mixtures of experts; without effect on dense models."""

    aux_loss_coeff: NonNegativeFloat | None = None
    """Coefficient of the load-balancing loss. null: as the model's config.json says."""
    z_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the router's z-loss (ST-MoE, arXiv 2202.08906, eq. 5)."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Step of the balancing bias of routers that have one (arXiv 2408.15664). 0: the bias stays as it was loaded."""
    routing_replay: bool = False
    """Train through the experts that the inference engine chose when it sampled (arXiv 2510.11370)."""
