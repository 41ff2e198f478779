"""Numbers in fp8 blocks, against a second reading of the format (tests/support/fp8_blocks.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ctpo_megatron.engine import fp8
from tests.support import fp8_blocks as slow
from tests.support.often import often

EXPONENTS = (-40, -12, 0, 20, 100)


def matrix(rows: int, columns: int, seed: int, exponent: int = 0) -> torch.Tensor:
    """Numbers of many sizes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, columns, generator=generator) * 2.0 ** torch.randint(-12, 3, (rows, columns), generator=generator)
    numbers[torch.rand(rows, columns, generator=generator) < 0.05] = 0
    return (numbers * 2.0**exponent).bfloat16()


def bytes_of(quantised: torch.Tensor) -> np.ndarray:
    return quantised.view(torch.uint8).numpy()


def test_every_number_of_the_format() -> None:
    """Each byte is read as the table has it, and each number, each middle and the numbers beside a middle are rounded to it."""
    every = torch.arange(256, dtype=torch.uint8)
    read = every.view(fp8.DTYPE).float().tolist()
    assert [read[byte] for byte in range(256) if byte & 0x7F != 0x7F] == [
        slow.number(byte) for byte in range(256) if byte & 0x7F != 0x7F
    ]
    middles = [(low + high) / 2 for low, high in zip(slow.TABLE, slow.TABLE[1:], strict=False)]
    beside = [float(np.nextafter(np.float32(x), np.float32(to))) for x in middles for to in (0, 448)]
    wanted = [sign * x for x in (*slow.TABLE, *middles, *beside) for sign in (1, -1)]
    assert torch.tensor(wanted).to(fp8.DTYPE).view(torch.uint8).tolist() == [slow.nearest(x) for x in wanted]
    assert slow.all_nearest(np.array(wanted, np.float32)).tolist() == [slow.nearest(x) for x in wanted]


@settings(max_examples=often(12), deadline=None)
@given(st.integers(1, 140), st.integers(1, 140), st.sampled_from(EXPONENTS), st.integers(0, 99))
@example(1, 1, 0, 0)
@example(129, 127, -12, 1)
@example(128, 128, 20, 2)
def test_matrices_of_any_size(rows: int, columns: int, exponent: int, seed: int) -> None:
    """Bytes and scales are those of the second reading, bit for bit, and so is what they stand for."""
    drawn = matrix(rows, columns, seed, exponent)
    quantised, scales = fp8.quantised_matrix(drawn)
    expected, expected_scales = slow.blocks(drawn.float().numpy())
    assert (bytes_of(quantised) == expected).all()
    assert (scales.numpy() == expected_scales).all()
    assert (fp8.matrix_of(quantised, scales).numpy() == slow.stands_for(expected, expected_scales)).all()


@settings(max_examples=often(40), deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.sampled_from(EXPONENTS), st.integers(0, 99))
def test_how_far_rounding_goes(rows: int, columns: int, exponent: int, seed: int) -> None:
    """1/16 of a number, or 2**-10 / 448 of its block's largest; once more changes nothing; cut at blocks it is the same."""
    drawn = matrix(rows, columns, seed, exponent).float()
    quantised, scales = fp8.quantised_matrix(drawn)
    found = fp8.matrix_of(quantised, scales)
    largest = torch.nn.functional.max_pool2d(drawn.abs()[None], 128, ceil_mode=True)[0].clamp(min=1e-12)
    largest = largest.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    assert ((found - drawn).abs() <= (drawn.abs() / 16).maximum(largest * 2**-10 / 448) * (1 + 1e-6)).all()
    again, _ = fp8.quantised_matrix(found)
    assert torch.equal(bytes_as_tensor(again), bytes_as_tensor(quantised))
    if rows > 128:
        upper, lower = fp8.quantised_matrix(drawn[:128]), fp8.quantised_matrix(drawn[128:])
        assert torch.equal(torch.cat([bytes_as_tensor(upper[0]), bytes_as_tensor(lower[0])]), bytes_as_tensor(quantised))
        assert torch.equal(torch.cat([upper[1], lower[1]]), scales)


def bytes_as_tensor(quantised: torch.Tensor) -> torch.Tensor:
    return quantised.view(torch.uint8)


def test_strips_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that is looked at in several strips is quantised as in one."""
    drawn = matrix(700, 200, 3)
    whole = fp8.quantised_matrix(drawn)
    monkeypatch.setattr(fp8, "STRIP", 2 * 128 * 200)
    parts = fp8.quantised_matrix(drawn)
    assert torch.equal(bytes_as_tensor(parts[0]), bytes_as_tensor(whole[0]))
    assert torch.equal(parts[1], whole[1])


def test_a_block_of_zeros() -> None:
    quantised, scales = fp8.quantised_matrix(torch.zeros(130, 3, dtype=torch.bfloat16))
    assert not bytes_of(quantised).any()
    assert (scales > 0).all()


def test_activations() -> None:
    """Each 128 columns of a token have a scale of their own; products are those of what is left."""
    x, weight = matrix(5, 384, 1), matrix(130, 384, 2)
    rounded = fp8.rounded_activations(x)
    for token in range(5):
        for first in range(0, 384, 128):
            group = x[token : token + 1, first : first + 128].float()
            quantised, scales = slow.blocks(group.numpy(), least=1e-10)
            expected = torch.from_numpy(slow.stands_for(quantised, scales))
            # scale and multiplier are found in the other order: a last bit of either, and rarely another number of the format
            close = (rounded[token, first : first + 128] - expected[0]).abs() <= expected[0].abs() * 2**-22
            assert close.float().mean() > 0.98
            assert (
                (rounded[token, first : first + 128] - group[0]).abs() <= group.abs().max() * 2**-10 / 448 + group[0].abs() / 15
            ).all()
    quantised, scales = fp8.quantised_matrix(weight)
    product = fp8.product(x, quantised, scales)
    assert product.dtype == torch.bfloat16
    exact = rounded.double() @ fp8.matrix_of(quantised, scales).double().T
    assert torch.allclose(product.double(), exact, rtol=2**-7, atol=float(exact.abs().max()) * 1e-5)
    with pytest.raises(ValueError, match="activations of 100 columns"):
        fp8.rounded_activations(torch.zeros(1, 100))
