"""Compiled attention over packed sequences, against a slow reading in float64, and whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctpo_megatron.kernels.cpu.packed import Packing, attend
from tests.support.often import often

LENGTHS = st.lists(st.sampled_from([1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 100]), min_size=1, max_size=6)
HEADS = st.sampled_from([(1, 1), (4, 4), (6, 2)])
DIMS = st.sampled_from([(16, 8), (32, 16), (48, 8), (48, 20), (64, 32), (16, 0)])  # with how many pairs are turned


@dataclass
class Case:
    """Sequences, and tensors that are parts of one, as megatron's are."""

    keys: list[list[int]]  # rows of each sequence's keys
    own: list[int]  # how many of them are its own, and the last
    q: Tensor
    k: Tensor
    v: Tensor
    turns: Tensor

    @classmethod
    def drawn(cls, lens: list[int], heads: tuple[int, int], dims: tuple[int, int], seed: int, shares: bool) -> Case:
        """With `shares` the first half of the first sequence stands before every other one's own tokens."""
        generator, (dim, half) = torch.Generator().manual_seed(seed), dims
        ends = np.cumsum(lens).tolist()
        rows = [list(range(end - length, end)) for end, length in zip(ends, lens, strict=True)]
        common = rows[0][: (lens[0] + 1) // 2] if shares else []
        both = torch.randn(ends[-1], heads[1], 2 * dim, generator=generator)
        angles = 3 * torch.randn(2 * max(lens), half, generator=generator)
        q = torch.randn(ends[-1], heads[0], dim, generator=generator)
        turns = torch.stack([angles.cos(), angles.sin()])
        return cls([rows[0], *(common + each for each in rows[1:])], lens, q, both[..., :dim], both[..., dim:], turns)

    def packing(self) -> Packing:
        bounds, k_bounds = ([0, *np.cumsum(sizes)] for sizes in (self.own, [len(each) for each in self.keys]))
        seen = [len(keys) - own + i + 1 for keys, own in zip(self.keys, self.own, strict=True) for i in range(own)]
        shares = any(keys[0] < len(self.keys[0]) for keys in self.keys[1:])
        roots = [0] * len(self.own) if shares else list(range(len(self.own)))
        return Packing.of(*(np.asarray(each, np.int64) for each in (bounds, seen, k_bounds, sum(self.keys, []), roots)))

    def slowly(self) -> tuple[Tensor, ...]:
        """The answer and the gradients of its sum weighted by `upstream`, in float64, one query at a time."""
        q, k, v = (each.double().requires_grad_() for each in (self.q, self.k, self.v))
        answers, at = [], 0
        for keys, own in zip(self.keys, self.own, strict=True):
            turned = torch.stack([self.turned(k[row], place) for place, row in enumerate(keys)])
            for place in range(len(keys) - own, len(keys)):
                group = q.shape[1] // k.shape[1]
                mine = self.turned(q[at], place)
                seen, values = (each.repeat_interleave(group, 1) for each in (turned[: place + 1], v[keys[: place + 1]]))
                weights = (0.3 * torch.einsum("hd,khd->hk", mine, seen)).softmax(-1)
                answers.append(torch.einsum("hk,khd->hd", weights, values))
                at += 1
        out = torch.stack(answers)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), self.upstream().double())

    def turned(self, heads: Tensor, place: int) -> Tensor:
        half = self.turns.shape[2]
        cosine, sine = self.turns[:, place].double()
        x, y, rest = heads.split([half, half, heads.shape[-1] - 2 * half], -1)
        return torch.cat([x * cosine - y * sine, y * cosine + x * sine, rest], -1)

    def upstream(self) -> Tensor:
        return torch.randn(self.q.shape, generator=torch.Generator().manual_seed(7))

    def compiled(self, threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs = [each.detach().requires_grad_() for each in (self.q, self.k, self.v)]
            out = attend(*inputs, self.packing(), self.turns, 0.3)
            return out.detach(), *torch.autograd.grad(out, inputs, self.upstream())
        finally:
            torch.set_num_threads(before)


@pytest.mark.thorough
@settings(max_examples=often(30), deadline=None)
@given(LENGTHS, HEADS, DIMS, st.integers(0, 2**16), st.booleans())
def test_the_answer_and_its_gradients(
    lens: list[int], heads: tuple[int, int], dims: tuple[int, int], seed: int, shares: bool
) -> None:
    case = Case.drawn(lens, heads, dims, seed, shares)
    for found, wanted in zip(case.compiled(1), case.slowly(), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [False, True])
def test_a_glance(shares: bool) -> None:
    case = Case.drawn([9, 33, 5], (4, 2), (32, 16), 1, shares)
    for found, wanted in zip(case.compiled(1), case.slowly(), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_no_bit(threads: int, shares: bool) -> None:
    case = Case.drawn([9, 65, 33, 1, 100], (6, 2), (32, 16), 3, shares)
    for found, wanted in zip(case.compiled(threads), case.compiled(1), strict=True):
        assert torch.equal(found, wanted)


def test_shares_are_all_units_once() -> None:
    packing = Case.drawn([100, 1, 1, 1, 1], (2, 2), (16, 8), 1, False).packing()
    assert packing.shares(2, 2) == [(0, 1), (1, 10)], "the long sequence's heads, apart"
    assert packing.shares(1, 1) == [(0, 5)]
    assert Case.drawn([4, 4], (2, 2), (16, 8), 1, True).packing().shares(1, 2) == [(0, 1)], "what shares keys stays together"


def test_a_number_that_is_none_shows() -> None:
    case = Case.drawn([40, 3], (2, 2), (16, 8), 5, False)
    case.k = case.k.clone()
    case.k[17, 1] = torch.nan
    out = case.compiled(2)[0]
    nan = out.isnan().any(-1)
    assert nan[17:40, 1].all(), "the queries that see it, in its head"
    assert nan.sum() == 23


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda case: {"q": case.q.bfloat16()}, "other numbers than float32"),
        (lambda case: {"q": case.q[..., :8], "k": case.k[..., :8], "v": case.v[..., :8]}, "a multiple of 16"),
        (lambda case: {"q": case.q.expand(-1, -1, 16)[..., :1].expand(-1, -1, 16)}, "do not lie in one row"),
        (lambda case: {"v": case.v[:-1]}, "keys and"),
        (lambda case: {"q": case.q[:-1]}, "42 queries, and sequences with 43"),
        (lambda case: {"k": case.k[:-1], "v": case.v[:-1]}, "42 keys, and sequences with row 42"),
        (lambda case: {"turns": case.turns[:, :39]}, "39 positions, and a sequence has 40"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[Case], dict[str, Tensor]], words: str) -> None:
    case = Case.drawn([40, 3], (2, 2), (16, 8), 5, False)
    packing = case.packing()
    case = replace(case, **change(case))
    with pytest.raises(ValueError, match=words):
        attend(case.q, case.k, case.v, packing, case.turns, 0.3)
