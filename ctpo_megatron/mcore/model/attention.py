"""Causal attention over packed sequences with torch alone: the core attention of the portable layer spec.

A micro-batch is laid out once: sequences of similar length are padded to a common one and go through torch's
scaled-dot-product attention together, so time grows as the sum of squared lengths, not as the square of the micro-batch. Under
context parallelism each rank keeps its queries and gathers all keys and values; the mask follows the positions in the whole
sequence (zigzag layout: rank r holds pieces r and 2*cp-1-r of each sequence). A sequence that shares its beginning with others
has the keys of that before its own; what reaches these from all of them is added up on the way back.

On CPUs in float32 a compiled function does the same without padding (`model.compiled`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from ctpo_megatron.batch import Sequences
from ctpo_megatron.mcore.model.compiled import Compiled, compiled_attention, kernels

if TYPE_CHECKING:
    from ctpo_megatron.kernels.cpu.packed import Packing

BUCKET_RATIO = math.sqrt(2.0)  # sequences in one bucket differ in length by at most this factor


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences that go through attention together: n of them, padded to q queries and k keys."""

    shape: tuple[int, int, int]  # n, q, k
    mask: Tensor | None  # [n, 1, q, k] bool, True where a query may look; None: plain causal, q = k


@dataclass(frozen=True, slots=True)
class Padding:
    """Where each padded row comes from, and where each packed row went."""

    rows: Tensor  # [P] int64: packed row of each padded row; 0 where there is none
    empty: Tensor  # [P, 1] bool: padded rows without a token
    home: Tensor | None  # [R] int64: padded row of each packed row; None: some have several, or none


@dataclass
class PackedLayout(PackedSeqParams):
    """megatron's description of packed sequences, with what `PackedAttention` needs; every layer of a micro-batch shares it."""

    buckets: list[Bucket] = field(default_factory=list)
    positions: Tensor | None = None  # [T] int64, of the whole micro-batch, where some sequences do not begin at 0
    queries: Padding | None = None
    keys: Padding | None = None
    compiled: Compiled | None = None  # where that is how attention is computed, and nothing else of this is there


def packed_params(cu_seqlens: Tensor, device: torch.device) -> PackedSeqParams:
    """megatron's description of the whole sequences `cu_seqlens` [N+1] (int32, on the CPU), on `device`."""
    return PackedSeqParams(**_thd(cu_seqlens, device))


def compiled_layout(sequences: Sequences, device: torch.device, cp_rank: int = 0, cp_size: int = 1) -> PackedLayout:
    """`packed_params` plus what compiled attention needs, of `sequences` on the CPU; lengths are multiples of 2 * cp_size."""
    packing = _keys_of(sequences, cp_rank, cp_size)
    layout = PackedLayout(**_thd(sequences.cu_seqlens, device), compiled=Compiled.of(packing))
    layout.max_seqlen_kv = packing.longest  # so far megatron makes rotary embeddings
    return layout


def _keys_of(sequences: Sequences, cp_rank: int, cp_size: int) -> Packing:
    """Which of all ranks' keys this rank's queries see."""
    cu_seqlens, before = sequences.cu_seqlens.to(torch.int64), sequences.shared_lengths().to(torch.int64)
    starts, lengths, each = cu_seqlens[:-1] // cp_size, cu_seqlens.diff(), torch.arange(len(before))
    roots = each if sequences.prefixes is None else torch.where(sequences.prefixes < 0, each, sequences.prefixes)
    q_bounds, k_bounds = cu_seqlens // cp_size, F.pad((before + lengths).cumsum(0), (1, 0))
    of_query = each.repeat_interleave(q_bounds.diff())
    place = torch.arange(len(of_query)) - q_bounds[of_query]
    position = before[of_query] + _position(place, lengths[of_query], cp_rank, cp_size)
    of_key = each.repeat_interleave(k_bounds.diff())
    at = torch.arange(len(of_key)) - k_bounds[of_key]
    owner = torch.where(at < before[of_key], roots[of_key], of_key)
    place = torch.where(at < before[of_key], at, at - before[of_key])
    rows = _gathered_row(place, lengths[owner], starts[owner], cp_size, int(q_bounds[-1]))
    return kernels("packed").Packing.of(*(each.numpy() for each in (q_bounds, position + 1, k_bounds, rows, roots)))


def packed_layout(sequences: Sequences, device: torch.device, cp_rank: int = 0, cp_size: int = 1) -> PackedLayout:
    """`packed_params` plus the padding of this rank's queries and of all keys, of `sequences` on the CPU.

    Lengths are multiples of 2 * cp_size.
    """
    cu_seqlens, prefixes = sequences.cu_seqlens, sequences.prefixes
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    starts = cu_seqlens[:-1].to(torch.int64) // cp_size
    before = sequences.shared_lengths()
    of_prefix = torch.arange(len(lengths)) if prefixes is None else prefixes.clamp(min=0)
    local_tokens = int(cu_seqlens[-1]) // cp_size
    bucket_of = _buckets(lengths) * (1 << 20) + _buckets(before)  # of similar length, after beginnings of similar length
    buckets, query_rows, key_rows = [], [], []
    for bucket in torch.unique(bucket_of[lengths > 0]).tolist():
        chosen = (bucket_of == bucket) & (lengths > 0)
        length, start, shared, prefix = lengths[chosen, None], starts[chosen, None], before[chosen, None], of_prefix[chosen]
        key_at = torch.arange(int((shared + length).max()))  # position in the whole sequence, what it shares included
        query_at = torch.arange(int(length.max()) // cp_size)  # place among this rank's tokens of the sequence
        query_rows.append(torch.where(query_at < length // cp_size, start + query_at, -1))
        key_row = _gathered_row(key_at - shared, length, start, cp_size, local_tokens)
        if shared.any():
            row = _gathered_row(key_at, lengths[prefix, None], starts[prefix, None], cp_size, local_tokens)
            key_row = torch.where(key_at < shared, row, key_row)
        key_rows.append(torch.where(key_at < shared + length, key_row, -1))
        mask = None
        if cp_size > 1 or shared.any():
            position = shared + _position(query_at, length, cp_rank, cp_size)  # [n, q]
            mask = (key_at <= position[..., None]).unsqueeze(1).to(device)
        buckets.append(Bucket((length.numel(), query_at.numel(), key_at.numel()), mask))
    queries = _padding(query_rows, local_tokens, device)
    keys = queries
    if cp_size > 1 or prefixes is not None:
        keys = _padding(key_rows, local_tokens * cp_size, device, several=prefixes is not None)
    layout = PackedLayout(**_thd(cu_seqlens, device), buckets=buckets, queries=queries, keys=keys)
    if prefixes is not None:
        layout.positions = torch.cat([torch.arange(b, b + n) for b, n in zip(before.tolist(), lengths.tolist(), strict=True)])
        layout.max_seqlen_kv = int((before + lengths).max())  # so far megatron makes rotary embeddings
    return layout


def _buckets(lengths: Tensor) -> Tensor:
    """The number of each length's bucket; 0 of lengths 0 and 1."""
    return torch.ceil(torch.log(lengths.clamp(min=1).double()) / math.log(BUCKET_RATIO)).to(torch.int64)


def _thd(cu_seqlens: Tensor, device: torch.device) -> dict[str, Any]:
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    cu = cu_seqlens.to(device=device, dtype=torch.int32, non_blocking=True)
    return {"qkv_format": "thd", "cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_seqlen_q": longest, "max_seqlen_kv": longest}


def _gathered_row(position: Tensor, length: Tensor, start: Tensor, cp_size: int, local_tokens: int) -> Tensor:
    """Row, among the tokens of all ranks in rank order, of a position in the whole sequence."""
    if cp_size == 1:
        return start + position
    piece_length = length // (2 * cp_size)
    piece = position // piece_length
    second = piece >= cp_size  # of the two pieces that its rank holds
    rank = torch.where(second, 2 * cp_size - 1 - piece, piece)
    return rank * local_tokens + start + second * piece_length + position % piece_length


def _position(place: Tensor, length: Tensor, cp_rank: int, cp_size: int) -> Tensor:
    """Position in the whole sequence of this rank's tokens; padded places count on, so no query is left without a key."""
    if cp_size == 1:
        return place
    piece_length = length // (2 * cp_size)
    piece = torch.where(place < piece_length, cp_rank, 2 * cp_size - 1 - cp_rank)
    return piece * piece_length + place - torch.where(place < piece_length, 0, piece_length)


def _padding(bucket_rows: list[Tensor], packed_rows: int, device: torch.device, *, several: bool = False) -> Padding:
    """`several`: packed rows may have several padded ones, or none."""
    rows = torch.cat([r.reshape(-1) for r in bucket_rows])
    empty = rows < 0
    home = None
    if not several:
        home = torch.empty(packed_rows, dtype=torch.int64)
        home[rows[~empty]] = torch.arange(rows.numel())[~empty]
        home = home.to(device)
    return Padding(rows.clamp(min=0).to(device), empty.unsqueeze(1).to(device), home)


class _Pad(torch.autograd.Function):
    """[R, C] packed rows to [P, C] padded rows. Where each has one, both directions are gathers, which a scatter-add is not."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, padding: Padding) -> Tensor:
        ctx.padding, ctx.packed_rows = padding, packed.shape[0]
        return packed.index_select(0, padding.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padding = ctx.padding
        if padding.home is not None:
            return grad.index_select(0, padding.home), None  # what padded rows hold never reaches a token
        total = grad.new_zeros(ctx.packed_rows, grad.shape[1])
        return total.index_add_(0, padding.rows, grad.masked_fill(padding.empty, 0.0)), None


class _Unpad(torch.autograd.Function):
    """[P, C] padded rows to [R, C] packed rows."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        if padding.home is None:
            raise ValueError("rows that went to several places do not come back from one")
        return padded.index_select(0, padding.home)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padding = ctx.padding
        return grad.index_select(0, padding.rows).masked_fill_(padding.empty, 0.0), None


class PackedAttention(torch.nn.Module):
    """Core attention for megatron's `SelfAttention` and `MLASelfAttention`; see this module's docstring. No dropout, no bias."""

    def __init__(self, config: Any, pg_collection: Any, softmax_scale: float | None = None, **_options: Any) -> None:
        super().__init__()
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedLayout,
        **_options: Any,
    ) -> Tensor:
        """query [T, heads, d], key [T, groups, d], value [T, groups, e] of this rank; returns [T, heads * e]."""
        layout, heads, groups = packed_seq_params, query.shape[1], key.shape[1]
        if layout.compiled is not None:
            return compiled_attention(query, key, value, layout.compiled, self.scale, self.cp_group)
        query, key, value = query.flatten(1), key.flatten(1), value.flatten(1)
        if self.cp_group.size() > 1:
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=1), group=self.cp_group)
            key, value = both.split([key.shape[1], value.shape[1]], dim=1)
        q, k, v = (_Pad.apply(x, p) for x, p in ((query, layout.queries), (key, layout.keys), (value, layout.keys)))
        outputs, at_q, at_k = [], 0, 0
        for bucket in layout.buckets:
            n, q_length, k_length = bucket.shape
            rows_q, rows_k = slice(at_q, at_q + n * q_length), slice(at_k, at_k + n * k_length)
            at_q, at_k = rows_q.stop, rows_k.stop
            attended = F.scaled_dot_product_attention(
                q[rows_q].view(n, q_length, heads, -1).transpose(1, 2),
                k[rows_k].view(n, k_length, groups, -1).transpose(1, 2),
                v[rows_k].view(n, k_length, groups, -1).transpose(1, 2),
                attn_mask=bucket.mask,
                is_causal=bucket.mask is None,
                scale=self.scale,
                enable_gqa=heads != groups,
            )
            outputs.append(attended.transpose(1, 2).reshape(n * q_length, -1))
        return _Unpad.apply(torch.cat(outputs), layout.queries)
