"""Segmented scans of whole sequences: every operator in every reach against a loop, and the exactness of sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctpo_megatron.algorithms import Channel, LocalScan, operators
from ctpo_megatron.algorithms.operators import AFFINE, MAX_TOKENS, check_length, from_fixed, segment_scan, to_fixed
from ctpo_megatron.algorithms.scan import segment_quantile
from tests.support.naive_scan import LOOPS, UNIT, borders, every_channel, expected
from tests.support.often import often

VALUES = st.floats(-30, 30)  # beyond +-20, where exact sums hold them
TOKENS = st.tuples(VALUES, st.floats(0, 1), st.booleans(), st.booleans())  # value, factor, mask, restart
PACKS = st.lists(st.lists(TOKENS, max_size=9), max_size=6)
EXACT = ("exact sum", "count", "min", "max")  # these do not round


def streams(pack: list[list[tuple]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and factors [T] float64, mask and restarts [T] bool."""
    tokens = [token for sequence in pack for token in sequence]
    kinds = (torch.float64, torch.float64, torch.bool, torch.bool)
    return tuple(torch.tensor([token[i] for token in tokens], dtype=kind) for i, kind in enumerate(kinds))


@settings(max_examples=often(60), deadline=None, derandomize=True)
@given(pack=PACKS, exact=st.booleans())
def test_every_operator_in_every_reach_is_its_loop(pack: list[list[tuple]], exact: bool) -> None:
    lengths = [len(sequence) for sequence in pack]
    asked = every_channel(*streams(pack), exact=exact)
    before = [each.channel.values.clone() for each in asked]
    found = LocalScan(exact).run([each.channel for each in asked], borders(lengths))
    for each, given_values, scanned in zip(asked, before, found, strict=True):
        rounds = each.name.startswith(EXACT)
        tolerance = {"rtol": 0, "atol": 0} if rounds else {"rtol": 1e-12, "atol": 1e-12}
        for got, want in zip(scanned, expected(each, lengths), strict=True):
            torch.testing.assert_close(got.double(), want, **tolerance, msg=lambda text, each=each: f"{each.name}: {text}")
        assert torch.equal(each.channel.values, given_values), f"{each.name}: the scan wrote into its input"


@pytest.mark.parametrize("lengths", [[1], [0], [], [0, 1, 0], [3, 0, 0, 5], [64, 1, 63], [1000]])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("block", [100, operators.BLOCK])
def test_lengths_at_the_edge(monkeypatch: pytest.MonkeyPatch, block: int, lengths: list[int], exact: bool) -> None:
    monkeypatch.setattr(operators, "BLOCK", block)
    draw = torch.Generator().manual_seed(len(lengths))
    size = sum(lengths)
    x, factor = (torch.rand(size, generator=draw, dtype=torch.float64) for _ in range(2))
    mask, restarts = (torch.rand(size, generator=draw) < share for share in (0.7, 0.1))
    asked = every_channel(8 * x - 4, factor, mask, restarts, exact=exact)
    for each, scanned in zip(asked, LocalScan(exact).run([a.channel for a in asked], borders(lengths)), strict=True):
        values, totals = expected(each, lengths)
        torch.testing.assert_close(scanned.values.double(), values, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(scanned.totals, totals, rtol=1e-12, atol=1e-9)


@settings(max_examples=often(100), deadline=None, derandomize=True)
@given(
    rewards=st.lists(st.tuples(st.floats(-1, 1), st.booleans()), min_size=1, max_size=20),
    gamma=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
)
def test_affine_suffix_is_the_discounted_return(rewards: list[tuple[float, bool]], gamma: float) -> None:
    """Masked tokens pass the return through: factor 1 and term 0, so only the policy's own steps are discounted."""
    values, mask = torch.tensor([r for r, _ in rewards], dtype=torch.float64), torch.tensor([m for _, m in rewards])
    maps = torch.stack([torch.where(mask, torch.tensor(gamma, dtype=torch.float64), 1.0), torch.where(mask, values, 0.0)])
    scanned = LocalScan().run([Channel(maps, AFFINE, reach) for reach in ("suffix", "after")], borders([len(rewards)]))
    for found, inclusive in zip(scanned, (True, False), strict=True):
        for t in range(len(rewards)):
            later = [j for j in range(t if inclusive else t + 1, len(rewards)) if mask[j]]
            want = sum(gamma**steps * rewards[j][0] for steps, j in enumerate(later))
            assert found.values[t].item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@settings(max_examples=often(100), deadline=None, derandomize=True)
@given(pack=PACKS, q=st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
def test_quantile_is_that_of_numpy(pack: list[list[tuple]], q: float) -> None:
    x, _, mask, _ = streams(pack)
    cu = borders([len(sequence) for sequence in pack])
    found = LocalScan().quantile(torch.where(mask, x, torch.nan), mask, cu, q)
    for number, sequence in enumerate(pack):
        counted = [value for value, _, is_policy, _ in sequence if is_policy]
        want = np.quantile(counted, q) if counted else 0.0
        assert found[number].item() == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_quantile_takes_tokens_in_any_order() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    ids = torch.tensor([1, 0, 1, 0, 1])
    assert segment_quantile(values, torch.ones(5, dtype=torch.bool), ids, 3, 0.5).tolist() == [3.0, 3.0, 0.0]


@settings(max_examples=often(100), deadline=None, derandomize=True)
@given(values=st.lists(VALUES, min_size=1, max_size=40), cut=st.integers(0, 40), dtype=st.sampled_from(["float32", "float64"]))
def test_exact_sums_are_the_same_bits_under_any_split(values: list[float], cut: int, dtype: str) -> None:
    stream = torch.tensor(values, dtype=getattr(torch, dtype))
    cut = min(cut, len(values))

    def scan(part: Tensor, reach: str) -> tuple[Tensor, Tensor]:
        return LocalScan().run([Channel(part.double(), reach=reach)], borders([part.numel()]))[0]

    for reach in ("prefix", "before", "suffix", "after"):
        whole, head, tail = scan(stream, reach), scan(stream[:cut], reach), scan(stream[cut:], reach)
        backward = reach in ("suffix", "after")
        joined = [head.values + tail.totals, tail.values] if backward else [head.values, tail.values + head.totals]
        assert torch.equal(torch.cat(joined), whole.values)
        assert torch.equal(head.totals + tail.totals, whole.totals)
    packed = LocalScan().run([Channel(stream.repeat(2))], borders([len(values)] * 2))[0].values
    assert torch.equal(*packed.chunk(2))
    assert packed.dtype == stream.dtype


def test_a_scan_keeps_the_dtype_of_its_values_and_float64_totals() -> None:
    values = torch.tensor([0.1, 0.2, 0.3])
    for exact in (True, False):
        scanned = LocalScan(exact).run([Channel(values)], borders([3]))[0]
        assert (scanned.values.dtype, scanned.totals.dtype) == (torch.float32, torch.float64)
        assert LocalScan(exact).run([Channel(values > 0.15)], borders([3]))[0].values.tolist() == [0.0, 1.0, 2.0]


def test_fixed_point_rounds_to_its_unit_and_holds_outliers() -> None:
    values = torch.tensor([0.1, -0.1, UNIT / 3, 20.5, -torch.inf], dtype=torch.float64)
    back = from_fixed(to_fixed(values))
    assert (back[:3] - values[:3]).abs().max() <= UNIT / 2
    assert back[3:].tolist() == [20.0, -20.0]


def test_a_sum_at_the_limit_is_right_and_a_longer_pack_is_refused() -> None:
    largest = torch.full((1,), 20.0).expand(MAX_TOKENS)
    for sign in (1, -1):
        scanned = LocalScan().run([Channel(sign * largest)], borders([MAX_TOKENS]))[0]
        assert scanned.totals.item() == sign * 20.0 * MAX_TOKENS
    check_length(MAX_TOKENS)
    for exact in (True, False):
        with pytest.raises(ValueError, match=f"{MAX_TOKENS + 1} tokens in one pack; exact prefix sums hold up to {MAX_TOKENS}"):
            LocalScan(exact).run([Channel(torch.zeros(1).expand(MAX_TOKENS + 1))], borders([MAX_TOKENS + 1]))


def test_wraparound_of_the_running_sum_does_not_matter() -> None:
    """Exact sums are differences of one sum over the pack; that one leaves int64's range here and comes back."""
    state = torch.tensor([[2**62, 2**62, 5, 2**62, 2**62, -7, 11]])
    first = torch.tensor([0, 1, 1, 3, 4, 4, 6])
    assert (torch.cumsum(state, -1) < 0).any()
    assert segment_scan(LOOPS["sum"].operator, state, first).tolist() == [[2**62, 2**62, 2**62 + 5, 2**62, 2**62, 2**62 - 7, 11]]


@settings(max_examples=often(50), deadline=None, derandomize=True)
@given(states=st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=3, max_size=3))
@pytest.mark.parametrize("name", ["sum", "min", "max", "affine", "ramp"])
def test_operators_are_monoids(name: str, states: list[list[float]]) -> None:
    operator = LOOPS[name].operator
    a, b, c = (torch.tensor(state, dtype=torch.float64)[: len(operator.identity)].unsqueeze(-1) for state in states)
    left = operator.combine(operator.combine(a, b), c)
    torch.testing.assert_close(left, operator.combine(a, operator.combine(b, c)), rtol=1e-12, atol=1e-9)
    empty = operator.empty_like(a)
    assert torch.equal(operator.combine(empty, a), a)
    assert torch.equal(operator.combine(a, empty), a)


def test_no_gradient_passes() -> None:
    values = torch.tensor([0.5, -0.5, 0.25], requires_grad=True)
    for exact in (True, False):
        scanned = LocalScan(exact).run([Channel(values), Channel(values, LOOPS["min"].operator)], borders([3]))
        assert not any(tensor.requires_grad for each in scanned for tensor in each)


@pytest.mark.parametrize("reach", ["suffix", "after"])
def test_suffixes_take_no_restarts(reach: str) -> None:
    with pytest.raises(ValueError, match="a suffix scan takes no restarts"):
        LocalScan().run([Channel(torch.zeros(2), reach=reach, restarts=torch.ones(2, dtype=torch.bool))], borders([2]))


def test_values_of_sequences_are_given_to_their_tokens() -> None:
    assert LocalScan().per_token(torch.tensor([7.0, 8.0, 9.0]), borders([2, 0, 1]), 3).tolist() == [7.0, 7.0, 9.0]
