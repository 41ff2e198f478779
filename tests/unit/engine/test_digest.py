"""The digest of a tensor: additive over every cut, the same on every path of computing it, and blind to no change."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctpo_megatron.engine import digest
from ctpo_megatron.engine.digest import MODULUS, Part, tensor_digest, tensor_digests
from tests.support.often import often
from tests.support.waits import Waits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 50),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES),
    row_cuts=st.lists(st.integers(0, 40), max_size=4),
    column_cuts=st.lists(st.integers(0, 50), max_size=4),
)
@settings(max_examples=often(60), deadline=None)
def test_parts_add_up(
    rows: int, columns: int, seed: int, dtype: torch.dtype, row_cuts: list[int], column_cuts: list[int]
) -> None:
    """However a matrix is cut into rectangles, the parts at their places make the whole."""
    whole = random((rows, columns), seed, dtype)
    down = sorted({0, rows, *(cut for cut in row_cuts if cut < rows)})
    across = sorted({0, columns, *(cut for cut in column_cuts if cut < columns)})
    parts = [
        tensor_digest(whole[top:bottom, left:right], top, left)
        for top, bottom in pairwise(down)
        for left, right in pairwise(across)
    ]
    assert sum(parts) % MODULUS == tensor_digest(whole)


def test_places_far_out() -> None:
    """Tables of keys grow, and their beginnings stay what they were."""
    whole = random((5000, 3000), 6)
    cuts = [(0, 500), (500, 1024), (1024, 3000)]
    parts = [tensor_digest(whole[top:bottom, a:b], top, a) for top, bottom in ((0, 1000), (1000, 5000)) for a, b in cuts]
    assert sum(parts) % MODULUS == tensor_digest(whole)


def naive(tensor: Tensor, row: int = 0, column: int = 0) -> int:
    """The definition, in Python's integers."""
    row_keys, column_keys = (digest._keys(2**17, stream, tensor.device).tolist() for stream in (2, 1))
    size, total = tensor.element_size(), 0
    for number, line in enumerate(tensor.reshape(-1, tensor.shape[-1]).view(torch.uint8)):
        for at, byte in enumerate(line.tolist(), start=column * size):
            total += row_keys[row + number] * column_keys[at // 4] * (byte << 8 * (at % 4))
    return total % MODULUS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "row", "column"), [((7,), 0, 0), ((7,), 0, 3), ((31, 13), 5, 1), ((3, 50, 110), 0, 0), ((1, 4000), 9, 2)]
)
def test_paths_agree(shape: tuple[int, ...], row: int, column: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed up by the compiled loop, by torch in blocks or by Python: one number."""
    tensor = random(shape, 3, dtype)
    expected = naive(tensor, row, column)
    assert digest._compiled() is not None
    assert tensor_digest(tensor, row, column) == expected
    monkeypatch.setattr(digest, "_compiled", lambda: None)
    assert tensor_digest(tensor, row, column) == expected
    monkeypatch.setattr(digest, "_BLOCK", 1)
    assert tensor_digest(tensor, row, column) == expected


def test_bytes_that_are_not_aligned() -> None:
    """Parts of a storage that begin anywhere in a word, with rows at any distance."""
    storage = random((1000,), 5, torch.float16)
    for offset, stride in ((1, 10), (2, 11), (3, 13), (0, 12)):
        part = storage.as_strided((9, 7), (stride, 1), offset)
        assert tensor_digest(part, 2, 3) == naive(part.clone(), 2, 3)


def test_keys_stay_as_they_are() -> None:
    """Trainer and servers may run different releases of torch: a known answer, and keys of which none loses a bit of a word."""
    tensor = torch.arange(24, dtype=torch.float32).view(4, 6)
    assert tensor_digest(tensor) == naive(tensor) == 6229898179668606976
    for stream in (1, 2):
        keys = digest._keys(1024, stream, torch.device("cpu"))
        assert bool((keys & 1).all())
        assert len(set(keys.tolist())) == 1024
        assert abs(float((keys >> 32).double().mean())) < 0.1 * 2**31


def test_most_extreme_words_are_exact() -> None:
    """Words count without a sign, in long rows too."""
    for value, word in ((-1, 2**32 - 1), (-(2**31), 2**31), (2**31 - 1, 2**31 - 1)):
        tensor = torch.full((3, 70_000), value, dtype=torch.int32)
        row_keys, column_keys = (digest._keys(2**17, stream, tensor.device).tolist() for stream in (2, 1))
        assert tensor_digest(tensor) == word * sum(row_keys[:3]) * sum(column_keys[:70_000]) % MODULUS


def changes() -> dict[str, Tensor]:
    """Named variants of one matrix, all of them different."""
    base = random((64, 48), 1)
    bits = base.view(torch.int16)
    found = {"base": base, "zeros": torch.zeros_like(base), "negated": -base, "rows rotated": base.roll(1, 0)}
    found |= {"columns rotated": base.roll(1, 1), "other": random((64, 48), 2), "rows reversed": base.flip(0)}
    for name, bit in (("sign", -(2**15)), ("exponent", 2**7), ("last bit", 1)):
        for where in (slice(0, 1), slice(0, 2), slice(None, None, 4), slice(3, None, 4), slice(None)):
            flipped = bits.clone()
            flipped[0, where] ^= bit
            found[f"{name} of {where}"] = flipped.view(torch.bfloat16)
    for name, (first, second) in {"columns": ((0, 0), (0, 4)), "rows": ((0, 0), (1, 0)), "far": ((2, 3), (60, 47))}.items():
        swapped = base.clone()
        swapped[first], swapped[second] = base[second], base[first]
        found[f"words swapped, {name}"] = swapped
    dropped = base.clone()
    dropped[-1] = 0
    found["row dropped"] = dropped
    for payload in (0x7FC0, 0x7FC1, 0x7FFF, -0x40):
        nan = bits.clone()
        nan[5, 5] = payload
        found[f"NaN {payload}"] = nan.view(torch.bfloat16)
    zero = base.clone()
    zero[7, 7] = 0.0
    found["zero"] = zero
    zero = base.clone()
    zero[7, 7] = -0.0
    found["minus zero"] = zero
    return found


def test_every_change_is_seen() -> None:
    variants = changes()
    digests = {name: tensor_digest(tensor) for name, tensor in variants.items()}
    assert len(variants) > 30
    assert len(set(digests.values())) == len(digests)


@pytest.mark.thorough
def test_every_single_bit_and_swap_is_seen() -> None:
    """All single flipped bits, and all exchanges of two neighbours: thousands of digests, no two alike."""
    base = random((6, 40), 4).view(torch.int16)
    found = {tensor_digest(base)}
    for row in range(6):
        for column in range(40):
            for bit in range(16):
                flipped = base.clone()
                flipped[row, column] ^= -(2**15) if bit == 15 else 2**bit
                found.add(tensor_digest(flipped))
    for column in range(39):
        swapped = base.clone()
        swapped[0, [column, column + 1]] = base[0, [column + 1, column]]
        found.add(tensor_digest(swapped))
    assert len(found) == 1 + 6 * 40 * 16 + 39


@pytest.mark.parametrize("tensor", [torch.tensor(2.5), torch.empty(0, 5), torch.ones(4, 6).t(), torch.ones(8, 6)[:, ::2]])
def test_odd_forms(tensor: Tensor) -> None:
    """Scalars, nothing, and elements that do not lie side by side."""
    assert tensor_digest(tensor) == tensor_digest(tensor.clone(memory_format=torch.contiguous_format))


def test_many_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the compiled loop cannot run: one number per tensor is what is copied, all of them together."""
    tensors = [random((rows, 24), rows) for rows in range(1, 30)] + [torch.empty(0, 4)]
    expected = [tensor_digest(tensor, 3, 2) for tensor in tensors]
    assert tensor_digests(Part(tensor, 3, 2) for tensor in tensors) == expected, "compiled"
    monkeypatch.setattr(digest, "_compiled", lambda: None)
    with Waits() as waits:
        found = tensor_digests(Part(tensor, 3, 2) for tensor in tensors)
    assert (found, waits.count) == (expected, 0)
    assert tensor_digests([]) == []
