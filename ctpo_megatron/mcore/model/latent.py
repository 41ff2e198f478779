"""Multi-head latent attention of the portable layer spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from ctpo_megatron.kernels.cpu.linear import linear, takes

if not isinstance(multi_latent_attention.TELinear, type):  # without TransformerEngine 0.16.1 takes a mock of it for the real one
    multi_latent_attention.HAVE_TE = False


class LatentSelfAttention(multi_latent_attention.MLASelfAttention):
    """megatron's, with the down-projections whole on every tensor-parallel rank, as TransformerEngine has them.

    megatron's local layers cut them (0.16.1), and then the gradient of the key that all heads share stays that of one rank's
    heads: the backward of gather_from_tensor_model_parallel_region does not sum over ranks.
    """

    def __init__(self, config: MLATransformerConfig, submodules: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, submodules, *args, **options)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank)
        self.linear_kv_down_proj = WholeLinear(config, config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim)


class WholeLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds whole and applies to its part of the sequence."""

    def __init__(self, config: MLATransformerConfig, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_size, in_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron's mark: partial gradients

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., in_size] to [..., out_size], and megatron's second output, the bias not added."""
        return linear(x, self.weight) if takes(x, self.weight) else F.linear(x, self.weight), None
