"""Memory for buckets of weights: given out again as soon as nobody holds a tensor that lies in it, and never before."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctpo_megatron.mcore.hf.buffers import BucketMemory

CPU = torch.device("cpu")


def bucket(memory: BucketMemory, numbers: int, fill: float) -> list[Tensor]:
    tensors = memory.allocate([(torch.float32, (2, numbers)), (torch.bfloat16, (numbers,))])
    for tensor in tensors:
        tensor.fill_(fill)
    return tensors


def test_tensors_are_neighbours() -> None:
    wide, narrow = BucketMemory(CPU).allocate([(torch.float32, (3, 5)), (torch.bfloat16, (7,))])
    assert (wide.shape, wide.dtype, narrow.shape, narrow.dtype) == ((3, 5), torch.float32, (7,), torch.bfloat16)
    assert narrow.data_ptr() == wide.data_ptr() + wide.nbytes
    assert wide.is_contiguous()


def test_two_in_turn() -> None:
    """Of a stream whose last two buckets are held only two pieces of memory are made, and kept for the next stream."""
    memory = BucketMemory(CPU)
    for _ in range(2):
        held: list[list[Tensor]] = []
        for size in (50, 20, 19, 20, 18):
            del held[:-1]
            held.append(bucket(memory, size, size))
    assert memory.nbytes == 10 * (50 + 20)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.sets(st.integers(0, 9))), max_size=20))
def test_what_is_held_stays(steps: list[tuple[int, set[int]]]) -> None:
    """Whatever is held for how long, even one tensor of a bucket, and whatever was asked for after it."""
    memory, held = BucketMemory(CPU), dict[int, Tensor]()
    for number, (size, dropped) in enumerate(steps):
        held[number] = bucket(memory, size, number)[number % 2]
        for old in dropped:
            held.pop(number - old, None)
        for filled, tensor in held.items():
            assert (tensor == filled).all()


def test_memory_of_what_was_dropped_is_used_again() -> None:
    memory = BucketMemory(CPU)
    first = bucket(memory, 30, 1.0)
    address = first[0].data_ptr()
    del first
    assert bucket(memory, 10, 2.0)[0].data_ptr() == address


def test_a_gpu_keeps_nothing_and_gives_out_new_memory() -> None:
    """A server may still read what it has answered for, so only memory that torch has freed is used again; pieces are alike."""
    memory = BucketMemory(torch.device("meta"))  # stands for a GPU
    storages = []
    for size in (40, 10, 20):
        tensors = memory.allocate([(torch.float32, (2, size)), (torch.bfloat16, (size,))])
        assert tensors[1].shape == (size,)
        storages.append(tensors[0].untyped_storage())
        del tensors
    assert len({storage._cdata for storage in storages}) == 3
    assert [storage.nbytes() for storage in storages] == [400] * 3
    assert memory.nbytes == 0
