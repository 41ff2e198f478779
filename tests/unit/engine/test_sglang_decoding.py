"""The compiled functions of SGLang's servers on CPUs, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctpo_megatron.engine.sglang.decoding import Decoder
from ctpo_megatron.kernels.cpu import rows
from tests.support.often import often

LENGTHS = st.lists(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 100, 257]), min_size=1, max_size=9)
HEADS = st.sampled_from([(1, 1), (4, 4), (6, 2)])


def cache(lens: list[int], key_heads: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values, NaN in slots that no sequence has, and the table; sequence i stands in row i + 1 of it."""
    generator = torch.Generator().manual_seed(seed)
    slots = 2 * sum(lens)
    mine = torch.randperm(slots, generator=generator)[: sum(lens)].int().split(lens)
    keys, values = torch.full((2, slots, key_heads, dim), torch.nan)
    table = torch.randint(slots, (len(lens) + 1, max(lens) + 3), generator=generator).int()
    for row, each in enumerate(mine, 1):
        table[row, : len(each)] = each
        keys[each.long()] = torch.randn(len(each), key_heads, dim, generator=generator)
        values[each.long()] = torch.randn(len(each), key_heads, dim, generator=generator)
    return keys, values, table


def expected(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scale: float) -> Tensor:
    """The answer to one sequence's query [heads, dim], by float64."""
    k, v = (each[slots.long()].double().repeat_interleave(len(query) // each.shape[1], 1) for each in (keys, values))
    weights = (scale * torch.einsum("hd,khd->hk", query.double(), k)).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, v).float()


@pytest.mark.thorough
@given(lens=LENGTHS, heads=HEADS, dim=st.sampled_from([16, 48]), spread=st.sampled_from([1, 60]))
@settings(max_examples=often(20), deadline=None)
def test_attention_is_that_of_float64(lens: list[int], heads: tuple[int, int], dim: int, spread: int) -> None:
    """Whatever the lengths, and however far apart the scores: each sequence looks at all of its own tokens, and at no others."""
    keys, values, table = cache(lens, heads[1], dim, sum(lens))
    query = spread * torch.randn(len(lens), heads[0], dim, generator=torch.Generator().manual_seed(1))
    rows, scale = torch.arange(1, len(lens) + 1), dim**-0.5
    answers = []
    for threads in (1, 3):
        decoder = Decoder(table, threads)
        assert decoder.fits(query, keys, values)
        answers.append(decoder.attend(query, keys, values, decoder.plan(rows, torch.tensor(lens)), scale))
    assert torch.equal(*answers)
    for row, length in enumerate(lens):
        wanted = expected(query[row], keys, values, table[row + 1, :length], scale)
        torch.testing.assert_close(answers[0][row], wanted, atol=3e-6 * spread, rtol=0)


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_what_is_no_number_shows(fault: float) -> None:
    """A sequence whose keys are broken has no answer, and its neighbours have theirs."""
    keys, values, table = cache([40, 40, 40], 2, 16, 0)
    keys[table[2, 17].long()] = fault
    decoder = Decoder(table, 1)
    query = torch.ones(3, 2, 16)
    out = decoder.attend(query, keys, values, decoder.plan(torch.tensor([1, 2, 3]), torch.tensor([40, 40, 40])), 0.25)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not out[[0, 2]].isnan().any()


def test_other_kinds_of_numbers_do_not_fit() -> None:
    """They are left to attention in parts."""
    q, cached = torch.zeros(2, 4, 16), torch.zeros(8, 2, 16)
    assert Decoder.fits(q, cached, cached)
    for other in (cached.bfloat16(), cached.transpose(0, 1)):
        assert not Decoder.fits(q, other, other)
    assert not Decoder.fits(q[..., :8], cached[..., :8].contiguous(), cached[..., :8].contiguous())


def test_activation_far_from_zero() -> None:
    """Where e^-x is no float32 any more, and where x is no number."""
    positive = torch.tensor([0.0, 1e-3, 1.0, 20.0, 80.0, 95.0, 1e4, torch.nan])
    gates = torch.cat([positive, -positive])
    x = torch.cat([gates, torch.full((16,), 2.0)])
    out = torch.empty(16)
    rows.silu_and_mul(x.data_ptr(), out.data_ptr(), 1, 16)
    wanted = (2 * torch.nn.functional.silu(gates.double())).float()
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)
