"""Attention on CPUs for a whole batch at once.

SGLang's `torch_native` backend calls PyTorch's attention once per sequence and layer, and for a cached prefix computes its
queries again; for small models that is most of the time. This one gathers keys and values of similarly long sequences into
one padded tensor and masks the padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

NAME = "torch_batched"
MAX_SCORES = 2**22  # queries x keys of one padded call, per head: bounds its memory


@dataclass(frozen=True)
class _Part:
    """B sequences that are computed together, padded to Q queries and K keys."""

    query_rows: Tensor  # [n] rows of the batch's flat queries
    query_slots: Tensor  # [n] their places in [B * Q]
    keys: Tensor  # [B * K] slots of the KV cache; a padded place repeats the sequence's first slot
    mask: Tensor  # [B, 1, Q, K] bool, True where a query may look
    shape: tuple[int, int]  # B, Q


def plan(new_lens: list[int], total_lens: list[int], slots: Tensor) -> list[_Part]:
    """Parts for sequences whose last `new_lens[i]` of `total_lens[i]` tokens are queries, concatenated in order.

    `slots` [N, >= max(total_lens)] holds each sequence's places in the KV cache.
    """
    starts = [0]
    for length in new_lens:
        starts.append(starts[-1] + length)
    order = sorted(range(len(new_lens)), key=lambda i: (new_lens[i], total_lens[i]))
    parts: list[_Part] = []
    members: list[int] = []
    for i in order:
        queries = max(new_lens[j] for j in [*members[-1:], i])
        keys = max([total_lens[j] for j in members] + [total_lens[i]])
        if members and (len(members) + 1) * queries * keys > MAX_SCORES:
            parts.append(_part(members, starts, new_lens, total_lens, slots))
            members = []
        members.append(i)
    parts.append(_part(members, starts, new_lens, total_lens, slots))
    return parts


def _part(members: list[int], starts: list[int], new_lens: list[int], total_lens: list[int], slots: Tensor) -> _Part:
    new, total = torch.tensor([new_lens[i] for i in members]), torch.tensor([total_lens[i] for i in members])
    queries, keys = int(new.max()), int(total.max())
    place, query = torch.arange(keys), torch.arange(queries)
    position = (total - new)[:, None] + query  # [B, Q] of each query in its sequence
    real = query < new[:, None]  # [B, Q]
    first = torch.tensor([starts[i] for i in members])
    mine = slots[torch.tensor(members), :keys]
    return _Part(
        query_rows=(first[:, None] + query)[real],
        query_slots=real.flatten().nonzero().squeeze(-1),
        keys=torch.where(place < total[:, None], mine, mine[:, :1]).long().flatten(),
        mask=(place <= position[..., None])[:, None],
        shape=(len(members), queries),
    )


class BatchedTorchBackend(TorchNativeAttnBackend):
    """Causal self-attention of decoder models; anything else is left to `torch_native`."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan a batch once, for every layer to use."""
        super().init_forward_metadata(forward_batch)
        total = forward_batch.seq_lens.tolist()
        new = [1] * len(total) if forward_batch.forward_mode.is_decode() else forward_batch.extend_seq_lens.tolist()
        slots = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, : max(total)]
        self._parts = plan(new, total, slots)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True) -> Tensor:
        """Attention of queries [T, heads * dim] after prefixes in the cache; as long as the queries."""
        if not _plain(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True) -> Tensor:
        """Attention of one query for each sequence, [B, heads * dim]; as many rows as queries."""
        if not _plain(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: RadixAttention, batch: ForwardBatch, save: bool) -> Tensor:
        """q [T, heads * dim] to [T, heads * dim]; with `save`, k and v go into the cache first."""
        if save and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        all_keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        all_values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        heads, dim = layer.tp_q_head_num, layer.qk_head_dim
        q = q.reshape(-1, heads, dim)
        out = torch.empty_like(q)
        for part in self._parts:
            count, queries = part.shape
            padded = q.new_zeros(count * queries, heads, dim)
            padded[part.query_slots] = q[part.query_rows]
            answer = scaled_dot_product_attention(
                padded.view(count, queries, heads, dim).transpose(1, 2),
                _gather(all_keys, part).to(q.dtype),
                _gather(all_values, part).to(q.dtype),
                attn_mask=part.mask,
                scale=layer.scaling,
                enable_gqa=heads != layer.tp_k_head_num,
            )
            out[part.query_rows] = answer.transpose(1, 2).reshape(count * queries, heads, dim)[part.query_slots]
        return out.view(-1, heads * dim)


def _gather(cache: Tensor, part: _Part) -> Tensor:
    """[B, heads, K, dim] out of the cache [slots, heads, dim]; `index_select` is five times faster here than indexing."""
    return cache.index_select(0, part.keys).view(part.shape[0], -1, *cache.shape[1:]).transpose(1, 2)


def _plain(layer: RadixAttention) -> bool:
    """Whether the layer is causal self-attention over everything before, with keys and values of one size."""
    from sglang.srt.layers.radix_attention import AttentionType

    sliding = layer.sliding_window_size is not None and layer.sliding_window_size > -1
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and not sliding
        and layer.qk_head_dim == layer.v_head_dim
    )


def register() -> None:
    """Offer this backend to SGLang as `--attention-backend torch_batched`."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(BatchedTorchBackend)
