"""The parts of a layer that on CPUs are compiled by numba: attention with its rotary embedding, norm and gated activation.

In float32 torch makes a pass over memory for each elementary step of them. Number formats and sizes that the compiled functions
do not take go the portable way, as all do where numba is missing. Nothing of numba is imported on GPUs.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

if TYPE_CHECKING:
    from ctpo_megatron.kernels.cpu.packed import Packing


@lru_cache
def kernels(name: str) -> Any:
    """Returns the module of `kernels.cpu`, compiled or read when it is first asked for; None where numba is missing."""
    there = importlib.util.find_spec("numba") is not None
    return importlib.import_module(f"ctpo_megatron.kernels.cpu.{name}") if there else None


def compiles_attention(config: TransformerConfig, device: torch.device) -> bool:
    """Returns whether the attention of a model of the portable spec is compiled."""
    plain = device.type == "cpu" and config.params_dtype == torch.float32 and not config.multi_latent_attention
    turned = not config.rotary_interleaved and not config.no_rope_freq
    return plain and turned and (lanes := kernels("lanes")) is not None and config.kv_channels % lanes.LANES == 0


@dataclass
class Compiled:
    """What compiled attention needs of a micro-batch: which keys queries see, and by what both are turned."""

    packing: Packing
    turns: Tensor  # [2, longest, half] cosines and sines; none (half 0) until a layer has them
    angles: Tensor | None = None  # of which they were made

    @classmethod
    def of(cls, packing: Packing) -> Compiled:
        """Returns that of a micro-batch before its first layer."""
        return cls(packing, torch.zeros(2, 0, 0))

    def turn_by(self, angles: Tensor, factor: float) -> None:
        """Have queries and keys turned by `angles` [longest, 1, 1, 2 * half], and made longer by `factor`.

        The halves of angles are equal, as all layers' are, so the cosines are made once.
        """
        if self.angles is not angles:
            half = angles.shape[-1] // 2
            self.angles, mine = angles, angles[:, 0, 0, :half].float()
            self.turns = torch.stack([mine.cos(), mine.sin()]).mul_(factor)


def compiled_attention(query: Tensor, key: Tensor, value: Tensor, compiled: Compiled, scale: float, cp_group: Any) -> Tensor:
    """query [T, heads, d], key and value [T, groups, d] of this rank, not yet turned; returns [T, heads * d]."""
    if cp_group.size() > 1:
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=cp_group)
        key, value = both.split([key.shape[1], value.shape[1]], dim=1)
    return kernels("packed").attend(query, key, value, compiled.packing, compiled.turns, scale).flatten(1)


class TurnedSelfAttention(SelfAttention):
    """megatron's, which leaves the rotary embedding to compiled attention where that comes after it."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        """As megatron's."""
        compiled, angles = getattr(options.get("packed_seq_params"), "compiled", None), options.get("rotary_pos_emb")
        if compiled is not None and angles is not None:
            compiled.turn_by(angles, _yarn_get_concentration_factor_from_config(self.config))
            options["rotary_pos_emb"] = None
        return super().forward(hidden_states, attention_mask, **options)


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, whose weight tells megatron that sequence parallelism leaves it with partial gradients."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_options: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron's own mark

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same shape."""
        layers = kernels("layers") if x.device.type == "cpu" else None
        if layers is not None and layers.normalises(x, self.weight):
            return layers.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGlu(MegatronModule):
    """silu of the first half of the last dimension times the second half: what megatron calls with a layer's whole projection."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 * size] to [..., size]."""
        layers = kernels("layers") if x.device.type == "cpu" else None
        if layers is not None and layers.gates(x):
            return layers.silu_and_mul(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
