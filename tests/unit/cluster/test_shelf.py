"""What a keeper holds, whatever the order in which parts come, and where keepers are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ctpo_megatron.cluster.keepers.places import keeping_node
from ctpo_megatron.cluster.keepers.shelf import MOST, Shelf
from ctpo_megatron.errors import CopyLost

RANKS, SIZE, PIECE = 3, 10, 4  # pieces of 4, 4 and 2 bytes
BEGINS = range(0, SIZE, PIECE)


def row(step: int, rank: int) -> np.ndarray:
    """The bytes of a part, which tell it from all others."""
    return np.random.default_rng([step, rank]).integers(0, 256, SIZE, dtype=np.uint8)


class Handing(RuleBasedStateMachine):
    """A driver that copies one step after the other, ranks whose pieces come in any order, and copies that break off."""

    @initialize()
    def nothing(self) -> None:
        self.shelf = Shelf()
        self.step = 0  # of the copy under way
        self.whole: int | None = None  # the step of the copy that all ranks have handed over
        self.begun: dict[int, set[int]] = {}  # by rank, which pieces have come
        self.finished: set[int] = set()

    @rule()
    def next_copy(self) -> None:
        self.step, self.begun, self.finished = self.step + 1, {}, set()

    @precondition(lambda self: self.step > 0)
    @rule(rank=st.integers(0, RANKS - 1))
    def begin(self, rank: int) -> None:
        self.shelf.begin(self.step, rank, SIZE, self.whole)
        self.begun[rank] = set()
        self.finished.discard(rank)

    @rule(rank=st.integers(0, RANKS - 1), begin=st.sampled_from(BEGINS))
    def put(self, rank: int, begin: int) -> None:
        piece = row(self.step, rank)[begin : begin + PIECE]
        if rank not in self.begun or rank in self.finished:
            with pytest.raises(CopyLost):
                self.shelf.put(self.step, rank, begin, piece)
        else:
            self.shelf.put(self.step, rank, begin, piece)
            self.begun[rank].add(begin)

    @rule(rank=st.integers(0, RANKS - 1))
    def finish(self, rank: int) -> None:
        if self.begun.get(rank) == set(BEGINS):
            self.shelf.finish(self.step, rank, b"%d %d" % (self.step, rank))
            self.finished.add(rank)
        else:
            with pytest.raises(CopyLost):
                self.shelf.finish(self.step, rank, b"")

    @precondition(lambda self: len(self.finished) == RANKS)
    @rule()
    def all_have_handed_over(self) -> None:
        self.shelf.retain(self.step)
        self.whole = self.step

    @invariant()
    def the_whole_copy_is_there_and_what_is_not_whole_cannot_be_read(self) -> None:
        for rank in range(RANKS):
            if self.whole is not None:
                assert self.shelf.contents(self.whole, rank) == b"%d %d" % (self.whole, rank)
                assert (self.shelf.read(self.whole, rank, 0, SIZE) == row(self.whole, rank)).all()
                assert (self.shelf.read(self.whole, rank, 3, 7) == row(self.whole, rank)[3:7]).all()
            if rank not in self.finished and self.step != self.whole:
                with pytest.raises(CopyLost):
                    self.shelf.read(self.step, rank, 0, 1)

    @invariant()
    def memory_is_bounded(self) -> None:
        held = self.shelf.held()
        assert all(sum(at[1] == rank for at in held) <= MOST for rank in range(RANKS))
        if self.whole is not None and self.step == self.whole and len(self.finished) == RANKS:
            assert {step for step, _ in held} == {self.whole}


TestHanding = Handing.TestCase


@pytest.mark.parametrize("begin", [-1, SIZE - PIECE + 1])
def test_bytes_that_do_not_belong_into_a_part_are_refused(begin: int) -> None:
    shelf = Shelf()
    shelf.begin(1, 0, SIZE, None)
    with pytest.raises(CopyLost, match="do not belong"):
        shelf.put(1, 0, begin, np.zeros(PIECE, dtype=np.uint8))


def test_pieces_that_overlap_make_no_whole() -> None:
    shelf = Shelf()
    shelf.begin(1, 0, SIZE, None)
    for begin in (0, 3, 6):
        shelf.put(1, 0, begin, np.zeros(PIECE, dtype=np.uint8))
    with pytest.raises(CopyLost, match="have not come"):
        shelf.finish(1, 0, b"")


NODES = st.sets(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=6)


@given(NODES, NODES)
def test_parts_are_kept_away_from_their_ranks_where_there_is_another_node(with_ranks: set[str], others: set[str]) -> None:
    alive = with_ranks | others
    kept = {node: keeping_node(node, with_ranks, alive) for node in with_ranks}
    assert set(kept.values()) <= alive
    if free := alive - with_ranks:
        assert set(kept.values()) <= free, "the loss of a node with ranks takes no part away"
        assert len(set(kept.values())) == min(len(free), len(with_ranks))
    elif len(with_ranks) > 1:
        assert all(node != on for node, on in kept.items())
        assert len(set(kept.values())) == len(with_ranks), "they share out the work"
    else:
        assert kept == {node: node for node in with_ranks}
