"""Where the Hugging Face tensors lie in the parameters of an SGLang engine, rank by rank (SGLang 0.5.23).

tests/integration/test_attest.py holds it against running servers of Qwen3 and Qwen3-MoE; qwen3 (tied), qwen2, llama and mixtral
agreed on two ranks too. deepseek_v3, glm4_moe and heads of keys and values that ranks share are from reading SGLang.
Weights in fp8 blocks lie as others do, and their scales as they do, counted in blocks (tests/integration/test_fp8.py).
Not covered, and so refused by the comparison: expert parallelism and data-parallel attention of the engine, shared experts that
are fused with the routed ones (`--disable-shared-experts-fusion` keeps them apart), tied embeddings where SGLang has an lm_head
all the same (its Qwen3-MoE and Mixtral), and MoE backends that store weights shuffled or transposed.
"""

from __future__ import annotations

import re
from collections.abc import KeysView
from dataclasses import dataclass

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.families import FAMILIES
from ctpo_megatron.models.quantised import BLOCK, SCALE_SUFFIX, check_attention, check_cut, is_quantised, scale_of
from ctpo_megatron.models.shape import HeadAttention, LatentAttention, ModelShape
from ctpo_megatron.models.tensors import HfTensor, hf_tensors

CPU_WIDTH_MULTIPLE = 32  # of each rank's part of an MLP; SGLang on CPUs fills narrower ones up, dense and experts differently
FLOAT32_ROUTERS = ("glm4_moe",)  # families whose routers SGLang keeps in float32 whatever the model's number format
VOCAB_MULTIPLE = 64  # SGLang fills the vocabulary up with rows of zeros, which add nothing to a digest

# buffers that an engine may report though no Hugging Face tensor is in them
DERIVED = (
    (re.compile(r"\.(cos_sin_cache|cos_cache|sin_cache|inv_freq|freqs_cis)$"), "tables of the rotary embedding"),
    (re.compile(r"\.expert_mask_gpu$"), "which experts are on the rank"),
)


@dataclass(frozen=True, slots=True)
class Placement:
    """A part of a Hugging Face tensor and where it lies in a tensor of one engine rank.

    Tensors are seen as matrices: a vector is one row, experts lie below each other.
    """

    rank: int
    tensor: str
    rows: slice
    columns: slice
    row: int  # where the part's first element lies in the engine's tensor
    column: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A Hugging Face tensor as a part of an engine's tensor: cut along `dim` into `pieces`, of which ranks may share one."""

    tensor: HfTensor
    engine_name: str
    at: int  # where it begins along the first dimension of the engine's tensor; of a vector these are columns of its one row
    dim: int | None
    pieces: int
    size: int  # of a piece along `dim`


class EngineLayout:
    """The layout for a model of `shape` on engines of `tp` tensor-parallel ranks, on CPUs or GPUs.

    `quantised`: they keep it in fp8 blocks (`models.quantised`). Raises ConfigError where the model cannot be cut for them.
    """

    def __init__(self, shape: ModelShape, tp: int, *, cpu: bool = False, quantised: bool = False) -> None:
        self.tp = tp
        if cpu:
            _check_cpu_widths(shape, tp)
        if quantised:
            check_attention(shape)
        self._shape = shape
        self._sources: dict[str, _Source] = {}
        self._stacks: dict[str, list[str]] = {}  # by the engine's name, in the order in which they are stacked
        self._ends: dict[str, int] = {}
        for tensor in hf_tensors(shape):
            engine_name = self._engine_name(tensor.name)
            dim, pieces, size = self._cut(tensor)
            self._add(tensor, engine_name, dim, pieces, size)
            if quantised and is_quantised(tensor):
                check_cut(tensor, dim, size, tp)
                self._add(scale_of(tensor), engine_name + SCALE_SUFFIX, dim, pieces, size // BLOCK)

    def _add(self, tensor: HfTensor, engine_name: str, dim: int | None, pieces: int, size: int) -> None:
        at = self._ends.get(engine_name, 0)
        self._ends[engine_name] = at + (size if dim == 0 else tensor.shape[0])
        self._sources[tensor.name] = _Source(tensor, engine_name, at, dim, pieces, size)
        self._stacks.setdefault(engine_name, []).append(tensor.name)

    @property
    def tensors(self) -> KeysView[str]:
        """Names of the tensors that each rank of the engine has."""
        return self._stacks.keys()

    @property
    def names(self) -> KeysView[str]:
        """Names of all Hugging Face tensors of the model."""
        return self._sources.keys()

    def size(self, name: str) -> tuple[int, ...]:
        """Shape of a Hugging Face tensor. Raises KeyError for one that the model has not."""
        return self._sources[name].tensor.shape

    def is_precise(self, name: str) -> bool:
        """Whether engines keep it in float32 whatever the model's number format."""
        tensor = self._sources[name].tensor
        return tensor.precise or (self._shape.family in FLOAT32_ROUTERS and tensor.key.endswith(".router.weight"))

    def sources(self, engine_name: str) -> list[str]:
        """Names of the Hugging Face tensors that an engine's tensor is made of; empty for one that is not known here."""
        return self._stacks.get(engine_name, [])

    def placements(self, name: str) -> list[Placement]:
        """All parts of the Hugging Face tensor `name`, one per rank. Raises KeyError for a tensor that the model has not."""
        source = self._sources[name]
        return [self._place(source, rank) for rank in range(self.tp)]

    def _place(self, source: _Source, rank: int) -> Placement:
        size = source.tensor.shape
        cuts = [slice(0, length) for length in size]
        if source.dim is not None:
            start = rank // (self.tp // source.pieces) * source.size
            stop = min(start + source.size, size[source.dim])  # of the vocabulary the last ranks may have less, or nothing
            cuts[source.dim] = slice(min(start, stop), stop)
        if len(size) == 1:
            return Placement(rank, source.engine_name, slice(0, 1), cuts[0], 0, source.at)
        return Placement(rank, source.engine_name, cuts[0], cuts[1], source.at, 0)

    def _engine_name(self, name: str) -> str:
        """The name that `/weights_checker` gives to the parameter that holds the Hugging Face tensor."""
        mixture = FAMILIES[self._shape.family].mixture
        expert = rf"\.{mixture.block}\.experts\.\d+\."
        name = re.sub(rf"{expert}({mixture.gate}|{mixture.up})\.weight$", f".{mixture.block}.experts.w13_weight", name)
        name = re.sub(rf"{expert}{mixture.down}\.weight$", f".{mixture.block}.experts.w2_weight", name)
        name = re.sub(r"\.(gate|up)_proj\.weight$", ".gate_up_proj.weight", name)
        attention = self._shape.attention
        if isinstance(attention, HeadAttention):
            return re.sub(r"\.self_attn\.[qkv]_proj\.", ".self_attn.qkv_proj.", name)
        if attention.q_rank is None:
            return name
        return re.sub(r"\.self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.", ".self_attn.fused_qkv_a_proj_with_mqa.", name)

    def _cut(self, tensor: HfTensor) -> tuple[int | None, int, int]:
        """The dimension along which SGLang's layers cut a tensor, the number of pieces, and their size.

        Column-parallel layers cut along the first dimension, row-parallel ones along the second.
        """
        *_, module, _kind = tensor.name.split(".")
        mixture = FAMILIES[self._shape.family].mixture
        pieces, dim, size = self.tp, 0, tensor.shape[0]
        if module in ("embed_tokens", "lm_head"):
            multiple = VOCAB_MULTIPLE
            if -(-size // multiple) * multiple % self.tp:
                multiple *= self.tp
            size = -(-size // multiple) * multiple
        elif module in ("k_proj", "v_proj") and isinstance(self._shape.attention, HeadAttention):
            pieces = min(self.tp, self._shape.attention.num_kv_heads)
        elif module in ("o_proj", "down_proj", mixture.down):
            dim, size = 1, tensor.shape[1]
        elif not self._is_column_parallel(module):
            return None, 1, 0
        if size % pieces or self.tp % pieces:
            raise ConfigError(
                f"rollout.engine.tp = {self.tp}: {tensor.name} {list(tensor.shape)} cannot be cut into {pieces} equal pieces; "
                "choose a number of ranks that divides the model's heads and widths."
            )
        return dim, pieces, size // pieces

    def _is_column_parallel(self, module: str) -> bool:
        mixture = FAMILIES[self._shape.family].mixture
        names = {"q_proj", "gate_proj", "up_proj", mixture.gate, mixture.up}
        if isinstance(self._shape.attention, LatentAttention):
            names |= {"q_b_proj", "kv_b_proj"}
        return module in names


def _check_cpu_widths(shape: ModelShape, tp: int) -> None:
    widths = {shape.ffn_hidden_size} if len(shape.expert_layers) < shape.num_layers else set()
    if shape.experts:
        widths |= {shape.experts.ffn_hidden_size, shape.experts.shared_ffn_hidden_size}
    for width in widths:
        if width % (CPU_WIDTH_MULTIPLE * tp):
            raise ConfigError(
                f"rollout.engine.tp = {tp}: SGLang on CPUs needs MLPs whose width is a multiple of {CPU_WIDTH_MULTIPLE} * tp = "
                f"{CPU_WIDTH_MULTIPLE * tp} to keep them as they are sent; the model has {width}."
            )
