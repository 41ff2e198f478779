"""The way back from a copy in memory: each rank is given its part, and what it shares with other ranks from theirs.

Nothing of the model changes before every rank has all that it needs and has compared it with the digests.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from ctpo_megatron.checkpoints.hashes import bytes_hash
from ctpo_megatron.errors import CopyLost
from ctpo_megatron.mcore.checkpoint import random_state
from ctpo_megatron.mcore.checkpoint.checkpoint import Trained
from ctpo_megatron.mcore.checkpoint.optimizer_state import load_optimizer
from ctpo_megatron.mcore.checkpoint.part import COMMON, RANDOM, Bytes, Contents, Layout, Shard
from ctpo_megatron.mcore.checkpoint.snapshot import Place, sharded_state
from ctpo_megatron.mcore.checkpoint.trainables import take_state
from ctpo_megatron.mcore.collective import first_complaint
from ctpo_megatron.parallel.plain import all_gather_plain

Read = Callable[[int, int, int], Bytes]  # of the part of a rank, the bytes from a place in its row to another
READ = 2**24  # bytes at a time


def recall(trained: Trained, layout: Layout, contents: Callable[[], Contents], read: Read) -> None:
    """Take weights, optimizer, schedule and random states from a copy; every rank calls it, at the layout that made the copy.

    `contents`: of this rank's part. Both it and `read` may raise CopyLost. Raises CopyLost on every rank where one of them does
    not get what it handed over; the model is as it was then.
    """
    mine, complaint = None, None
    try:
        mine = contents()
        _require_same(mine, layout, trained.header()["dtype"])
    except CopyLost as error:
        complaint = str(error)
    everybodys = all_gather_plain(mine, Contents | None)
    _raise_together(complaint)
    assert mine is not None, "no rank has complained"
    where = {shard.place: (rank, shard) for rank, each in enumerate(everybodys) if each for shard in each.shards}
    own = {shard.place: (torch.distributed.get_rank(), shard) for shard in mine.shards}
    prepared, local, factories = load_preprocess(sharded_state(trained.models, trained.optimizer, loading=True))
    sharded, _ = extract_sharded_base(prepared)
    found: dict[Place, Any] = {}
    try:
        for place in (COMMON, RANDOM):
            found[place] = _content(place, own, read)
        for place in {_place(leaf) for leaf in nested_values(sharded)}:
            found[place] = _content(place, where, read)
    except CopyLost as error:
        complaint = str(error)
    _raise_together(complaint)
    state = found[COMMON]
    merge(state, local)
    dict_list_map_inplace(lambda leaf: _fitted(found[_place(leaf)], leaf), sharded)
    merge(state, sharded)
    _apply(trained, apply_factory_merges(state, factories), mine, found[RANDOM])


def _apply(trained: Trained, state: dict[str, Any], mine: Contents, random: dict[str, Any]) -> None:
    for number, model in enumerate(trained.models):
        take_state(model, state[f"model{number}"])
    if trained.optimizer is not None and trained.schedule is not None:
        load_optimizer(trained.optimizer, state["optimizer"])
        trained.schedule.num_steps = 0
        trained.schedule.step(mine.scheduler_steps)
    random_state.set_states(random)


def _require_same(mine: Contents, layout: Layout, dtype: str) -> None:
    if mine.layout != layout:
        raise CopyLost(f"it was made at the layout {mine.layout}, and this is {layout}")
    if mine.dtype != dtype:
        raise CopyLost(f"its weights are {mine.dtype}, the trainer's {dtype}")


def _raise_together(complaint: str | None) -> None:
    if words := first_complaint(complaint):
        raise CopyLost(words)


def _place(leaf: ShardedBase) -> Place:
    """Returns where a shard that the model asks for is in the whole, as `take_snapshot` names it."""
    if isinstance(leaf, ShardedTensor):
        return leaf.key, tuple(leaf.global_offset)
    return leaf.unique_key, None


def _content(place: Place, where: dict[Place, tuple[int, Shard]], read: Read) -> Any:
    """Returns the tensor at `place`, or the object. Raises CopyLost where it is missing or not as it was handed over."""
    if place not in where:
        raise CopyLost(f"{place[0]} at {place[1]} is in no part of it")
    rank, shard = where[place]
    content: Bytes = np.empty(shard.end - shard.begin, dtype=np.uint8)
    for begin in range(shard.begin, shard.end, READ):
        end = min(begin + READ, shard.end)
        content[begin - shard.begin : end - shard.begin] = read(rank, begin, end)
    if bytes_hash(content.data) != shard.digest:
        raise CopyLost(f"{place[0]} at {place[1]} in the part of rank {rank} is not what was handed over")
    if shard.dtype:
        return shard.tensor(content)
    try:
        return torch.load(io.BytesIO(content.tobytes()), weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise CopyLost(f"{place[0]} in the part of rank {rank} is no plain value: {error}") from error


def _fitted(found: Any, leaf: ShardedBase) -> Any:
    """Returns what was found as the model has it: a checkpoint stores tensors with more axes, and objects in lists."""
    return found.reshape(leaf.local_shape) if isinstance(leaf, ShardedTensor) else found[0]
