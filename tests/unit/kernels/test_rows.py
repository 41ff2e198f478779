"""The compiled norm and gated activation, against float64, and whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ctpo_megatron.kernels.cpu import layers

SHAPES = [(1, 16), (7, 3, 48), (2500, 64)]  # the last: in threads, its weight's gradient in many blocks


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The answer, and the gradients of its sum weighted by fixed numbers."""
    inputs = tuple(each.detach().requires_grad_() for each in inputs)
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norm(shape: tuple[int, ...], scale: float) -> None:
    x, weight = scale * torch.randn(shape), torch.randn(shape[-1])
    found = with_gradients(lambda x, weight: layers.rms_norm(x, weight, 1e-6), x, weight)
    for mine, wanted in zip(found, with_gradients(norm, x.double(), weight.double()), strict=True):
        torch.testing.assert_close(mine, wanted.float(), rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_activation(shape: tuple[int, ...], scale: float) -> None:
    x = scale * torch.randn(*shape[:-1], 2 * shape[-1])
    for mine, wanted in zip(with_gradients(layers.silu_and_mul, x), with_gradients(swiglu, x.double()), strict=True):
        torch.testing.assert_close(mine, wanted.float(), rtol=1e-5, atol=1e-5 * scale)


def test_rows_that_lie_apart() -> None:
    x = torch.randn(5, 2, 64)[:, 0]
    assert torch.equal(layers.rms_norm(x, torch.ones(64), 1e-6), layers.rms_norm(x.contiguous(), torch.ones(64), 1e-6))
    assert torch.equal(layers.silu_and_mul(x), layers.silu_and_mul(x.contiguous()))


def test_a_long_sum_rounds_no_more_than_torchs() -> None:
    """The weight's gradient over 20,000 rows, of which one sum after another would lose five times as much."""
    x, weight = torch.randn(20_000, 16), torch.randn(16)
    exact = with_gradients(norm, x.double(), weight.double())[2]
    mine, torchs = (
        (with_gradients(way, x, weight)[2] - exact).norm() for way in (lambda x, weight: layers.rms_norm(x, weight, 1e-6), norm)
    )
    assert mine < 2 * torchs


def test_threads_change_no_bit() -> None:
    x, weight, before = torch.randn(SHAPES[-1]), torch.randn(64), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            norms = with_gradients(lambda x, weight: layers.rms_norm(x, weight, 1e-6), x, weight)
            found.append((*norms, *with_gradients(layers.silu_and_mul, x)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mine, alone) for other in found[1:] for mine, alone in zip(other, found[0], strict=True))


def test_what_they_do_not_take() -> None:
    x, weight = torch.zeros(3, 32), torch.ones(32)
    taken = [layers.normalises(x, weight), layers.gates(x)]
    refused = [
        layers.normalises(x.bfloat16(), weight.bfloat16()),
        layers.normalises(x[:, :24], weight[:24]),
        layers.normalises(x, weight[:16]),
        layers.gates(x.bfloat16()),
        layers.gates(x[:, :16]),
    ]
    assert all(taken)
    assert not any(refused)
