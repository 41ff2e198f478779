"""Hooks on every module of a rank's model: what leaves it forward, and the gradient that comes back to it.

Gradients are seen by hooks on the tensors that left a module. megatron's layers change some of their tensors in place, which a
module's own backward hook does not survive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.mcore.hf.load import layer_numbers, unwrap
from ctpo_megatron.mcore.replay.findings import ModuleSeen, Order, Place
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import parameter_key
from ctpo_megatron.parallel import shard_indices

LOG_PROBS = "log-probs of the labels"
_BEFORE, _FINAL = "embedding", "decoder.final_layernorm"
_LAYERS = "decoder.layers."


_PADDING = 2**62  # added to a place's key where it is no token of a sequence
_POSITIONS = 2**31


class Rows:
    """Which token of the batch each local position of a shard is. A place is coded as sequence * 2**31 + position."""

    def __init__(self, shard: MicroBatch, coords: RankCoords) -> None:
        part = shard.sequences
        cu_seqlens, ids, lengths = part.cu_seqlens.cpu().to(torch.int64), part.ids.cpu(), part.lengths.cpu()
        whole = shard_indices(cu_seqlens, coords.cp_rank, coords.cp_size)
        row = torch.searchsorted(cu_seqlens, whole, right=True) - 1
        position = whole - cu_seqlens[row]
        padding = (ids[row] < 0) | (position >= lengths[row])
        self._keys = ids[row].clamp(min=0) * _POSITIONS + position + padding * _PADDING
        self._coords = coords

    def place(self, local: int) -> Place:
        """The token at a position of the shard."""
        padding, key = divmod(int(self._keys[local]), _PADDING)
        return Place(*divmod(key, _POSITIONS), padding=bool(padding))

    def first(self, bad: Tensor) -> Place | None:
        """The first token of `bad` [rows] in the order of sequences and positions, real ones before padding.

        Rows are all tokens of the shard, or this tensor-parallel rank's run of them; None where they are neither.
        """
        count, shift = self._keys.numel(), 0
        if bad.numel() != count:
            if bad.numel() * self._coords.tp_size != count:
                return None
            shift = self._coords.tp_rank * bad.numel()
        rows = bad.cpu().nonzero().flatten() + shift
        return self.place(int(rows[self._keys[rows].argmin()])) if rows.numel() else None


class Probe:
    """Sees all passes of one rank's model while it `watch`es. `shards`: those that will be run, on the device."""

    def __init__(
        self, models: list[nn.Module], shape: ModelShape, coords: RankCoords, rank: int, shards: list[MicroBatch]
    ) -> None:
        self._models, self._shape, self._coords, self._rank = models, shape, coords, rank
        self._rows = [Rows(shard, coords) for shard in shards]
        self._numbers = {shard.tokens.input_ids.data_ptr(): number for number, shard in enumerate(shards)}
        self._now = 0  # the micro-batch at hand
        self._orders: dict[str, Order] = {}
        self._finished: dict[int, int] = {}  # modules of a layer that have finished
        self._forward: dict[str, ModuleSeen] = {}
        self._backward: dict[str, ModuleSeen] = {}

    @property
    def forward(self) -> list[ModuleSeen]:
        """What left the modules."""
        return list(self._forward.values())

    @property
    def backward(self) -> list[ModuleSeen]:
        """The gradients of what left them."""
        return list(self._backward.values())

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Inside it, all that the modules do is seen."""
        handles = [handle for model in self._models for handle in self._hooks(model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def log_probs(self, logp: Tensor) -> None:
        """See the log-probs [T_local] that the last stage makes of the micro-batch at hand."""
        self._see(LOG_PROBS, self._shape.num_layers + 1, logp)

    def rows(self, shard: MicroBatch) -> Rows:
        """Which tokens a shard's positions are."""
        return self._rows[self._numbers[shard.tokens.input_ids.data_ptr()]]

    def _hooks(self, model: nn.Module) -> Iterator[Any]:
        inner, layers = unwrap(model), layer_numbers(model)
        first_expert = self._coords.ep_rank * (self._shape.num_experts // self._coords.ep_size)
        yield inner.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name, module in inner.named_modules():
            if not name.startswith((_BEFORE, _LAYERS, _FINAL)) or isinstance(module, nn.ModuleList):
                continue
            known = parameter_key(f"{name}.", layers, first_expert)[:-1]
            layer = -1 if name.startswith(_BEFORE) else self._shape.num_layers
            if name.startswith(_LAYERS):
                layer = int(known.removeprefix(_LAYERS).partition(".")[0])
            yield module.register_forward_hook(self._hook(known, layer))

    def _begin(self, _model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = inputs[0] if inputs else named["input_ids"]
        self._now = self._numbers[ids.data_ptr()]

    def _hook(self, name: str, layer: int) -> Any:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            several = output if isinstance(output, tuple | list) else (output,)  # the first is what goes on, then biases and maps
            each = next((each for each in several if isinstance(each, Tensor)), None)
            if each is not None and each.is_floating_point():
                self._see(name, layer, each)

        return see

    def _see(self, name: str, layer: int, output: Tensor) -> None:
        if name not in self._orders:
            self._finished[layer] = self._finished.get(layer, 0) + 1
            self._orders[name] = (layer, self._finished[layer])
        rows = self._rows[self._now]
        self._note(self._forward, name, output.detach(), rows)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._note(self._backward, name, gradient.detach(), rows))

    def _note(self, seen: dict[str, ModuleSeen], name: str, values: Tensor, rows: Rows) -> None:
        finite = torch.isfinite(values)
        largest = float(torch.where(finite, values.abs(), 0.0).amax()) if values.numel() else 0.0
        bad, place = int((~finite).sum()), None
        if bad and not (".experts." in name or name.endswith(".experts")):  # their rows are sorted by expert
            place = rows.first(_per_row(~finite))
        before = seen.get(name)
        if before is not None:
            largest, bad = max(largest, before.largest), bad + before.nonfinite
            place = min((p for p in (place, before.place) if p is not None), key=lambda p: (p.padding, p), default=None)
        seen[name] = ModuleSeen(name, self._orders[name], largest, bad, place, self._rank)


def _per_row(bad: Tensor) -> Tensor:
    """Whether anything of a token is bad: [tokens], of [tokens, ...] or [1, tokens, ...]."""
    if bad.dim() > 2 and bad.shape[0] == 1:
        bad = bad[0]
    return bad.flatten(1).any(1) if bad.dim() > 1 else bad
