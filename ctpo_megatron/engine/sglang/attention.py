"""Attention on CPUs for a whole batch at once.

SGLang's `torch_native` backend calls PyTorch's attention once per sequence and layer, and for a cached prefix computes its
queries again; for small models that is most of the time. Here a step that decodes calls a compiled function, which reads keys and
values where they lie. For other steps keys and values of similarly long sequences are gathered into one padded tensor and the
padding is masked, a few parts for a batch: what is padded is read, and with long tails it would be most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

NAME = "torch_batched"
MAX_SCORES = 2**22  # queries x keys of one padded call, per head: bounds its memory
PART_COST = 768  # padded places that take as long as the calls of one more part: 400 with 5 million parameters, 1,100 with 0.5


@dataclass(frozen=True)
class _Part:
    """B sequences that are computed together, padded to Q queries and K keys."""

    query_rows: Tensor  # [n] rows of the batch's flat queries
    query_slots: Tensor  # [n] their places in [B * Q]
    keys: Tensor  # [B * K] slots of the KV cache; a padded place repeats the sequence's first slot
    mask: Tensor  # [B, 1, Q, K] bool, True where a query may look
    bias: Tensor  # the same as what is added to scores, 0 or -inf: made once, and not by each layer
    shape: tuple[int, int]  # B, Q


def plan(new_lens: list[int], total_lens: list[int], slots: Tensor) -> list[_Part]:
    """Parts for sequences whose last `new_lens[i]` of `total_lens[i]` tokens are queries, concatenated in order.

    `slots` [N, >= max(total_lens)] holds each sequence's places in the KV cache. A part ends where its scores would become too
    many, or its padding would cost more than one more part.
    """
    starts = [0]
    for length in new_lens:
        starts.append(starts[-1] + length)
    order = sorted(range(len(new_lens)), key=lambda i: (new_lens[i], total_lens[i]))
    parts: list[_Part] = []
    members: list[int] = []
    real = most_queries = most_keys = 0
    for i in order:
        queries, keys = max(most_queries, new_lens[i]), max(most_keys, total_lens[i])
        count, places = len(members) + 1, real + new_lens[i] + total_lens[i]
        if members and (count * queries * keys > MAX_SCORES or count * (queries + keys) - places > PART_COST):
            parts.append(_part(members, starts, new_lens, total_lens, slots))
            members, queries, keys, places = [], new_lens[i], total_lens[i], new_lens[i] + total_lens[i]
        members.append(i)
        real, most_queries, most_keys = places, queries, keys
    parts.append(_part(members, starts, new_lens, total_lens, slots))
    return parts


def _part(members: list[int], starts: list[int], new_lens: list[int], total_lens: list[int], slots: Tensor) -> _Part:
    new, total = torch.tensor([new_lens[i] for i in members]), torch.tensor([total_lens[i] for i in members])
    queries, keys = max(new_lens[i] for i in members), max(total_lens[i] for i in members)
    place, query = torch.arange(keys), torch.arange(queries)
    there = place < total[:, None]  # [B, K]
    mine = slots[torch.tensor(members), :keys]
    first = torch.tensor([starts[i] for i in members])
    if queries == 1:  # as in every step but those that read prompts; made for each of them, so with few calls
        rows, places, mask = first, torch.arange(len(members)), there[:, None, None]
    else:
        real = query < new[:, None]  # [B, Q]
        rows, places = (first[:, None] + query)[real], real.flatten().nonzero().squeeze(-1)
        mask = (place <= ((total - new)[:, None] + query)[..., None])[:, None]
    return _Part(
        query_rows=rows,
        query_slots=places,
        keys=torch.where(there, mine, mine[:, :1]).flatten(),
        mask=mask,
        bias=torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf),
        shape=(len(members), queries),
    )


class BatchedTorchBackend(TorchNativeAttnBackend):
    """Causal self-attention of decoder models; anything else is left to `torch_native`."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        from ctpo_megatron.engine.sglang.decoding import Decoder  # compiles, which a GPU's server has no need of

        self._decoder = Decoder(self.req_to_token_pool.req_to_token, torch.get_num_threads())

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan a batch once, for every layer to use."""
        super().init_forward_metadata(forward_batch)
        decodes = forward_batch.forward_mode.is_decode()
        self._step = self._decoder.plan(forward_batch.req_pool_indices, forward_batch.seq_lens) if decodes else None
        self._planned: list[_Part] = []

    def _parts(self, batch: ForwardBatch) -> list[_Part]:
        """The batch in parts, planned when the first layer wants them."""
        if not self._planned:
            total = batch.seq_lens.tolist()
            new = [1] * len(total) if batch.forward_mode.is_decode() else batch.extend_seq_lens.tolist()
            slots = self.req_to_token_pool.req_to_token[batch.req_pool_indices, : max(total)]
            self._planned = plan(new, total, slots)
        return self._planned

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
        all_keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        all_values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        if save and k is not None:
            if type(self.token_to_kv_pool) is MHATokenToKVPool and all_keys.dtype == all_values.dtype == k.dtype:
                store(all_keys, batch.out_cache_loc, k)
                store(all_values, batch.out_cache_loc, v)
            else:
                self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        heads, dim = layer.tp_q_head_num, layer.qk_head_dim
        q = q.reshape(-1, heads, dim)
        if self._step is not None and self._decoder.fits(q, all_keys, all_values):
            return self._decoder.attend(q, all_keys, all_values, self._step, layer.scaling).view(-1, heads * dim)
        out = torch.empty_like(q)
        for part in self._parts(batch):
            attend(q, all_keys, all_values, part, layer.scaling, out)
        return out.view(-1, heads * dim)


def store(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Put rows [T, heads * dim] into the `slots` [T] of a cache [slots, heads, dim].

    SGLang indexes the cache, for which torch wakes its threads: 150 us for 80 rows where two threads serve, and 4 us so.
    """
    cache.index_copy_(0, slots, rows.reshape(-1, *cache.shape[1:]))


def attend(q: Tensor, keys: Tensor, values: Tensor, part: _Part, scale: float, out: Tensor) -> None:
    """Write into `out`, shaped as q [T, heads, dim], what the queries of `part` see in the cache [slots, key heads, dim]."""
    mine = _attend_last if part.shape[1] == 1 else _attend_padded
    mine(q, _gather(keys, part).to(q.dtype), _gather(values, part).to(q.dtype), part, scale, out)


def _attend_last(q: Tensor, keys: Tensor, values: Tensor, part: _Part, scale: float, out: Tensor) -> None:
    """One query of each sequence. The query heads of a key head stand as queries of it: nothing is repeated for them."""
    count, key_heads, dim = keys.shape[0], keys.shape[1], q.shape[-1]
    mine = q.index_select(0, part.query_rows).view(count, key_heads, -1, dim)
    answer = scaled_dot_product_attention(mine, keys, values, attn_mask=part.bias.to(q.dtype), scale=scale)
    out.index_copy_(0, part.query_rows, answer.reshape(count, -1, dim))


def _attend_padded(q: Tensor, keys: Tensor, values: Tensor, part: _Part, scale: float, out: Tensor) -> None:
    """Any number of queries of each sequence, padded."""
    (count, queries), (heads, dim) = part.shape, q.shape[1:]
    padded = q.new_zeros(count * queries, heads, dim)
    padded[part.query_slots] = q[part.query_rows]
    answer = scaled_dot_product_attention(
        padded.view(count, queries, heads, dim).transpose(1, 2),
        keys,
        values,
        attn_mask=part.bias.to(q.dtype),
        scale=scale,
        enable_gqa=heads != keys.shape[1],
    )
    out[part.query_rows] = answer.transpose(1, 2).reshape(count * queries, heads, dim)[part.query_slots]


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
