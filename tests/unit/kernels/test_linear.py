"""Products with weights by oneDNN, against float64; and where they are computed so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ctpo_megatron.kernels.cpu import linear as products

X = (700, 2, 96)


@pytest.fixture(autouse=True)
def onednn() -> Iterator[None]:
    """oneDNN computes the products, whatever the processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    with patch.object(products, "pays", lambda: True):
        yield


def with_gradients(x: Tensor, weight: Tensor, upstream: Tensor, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), upstream)


@pytest.mark.parametrize("outputs", [32, 96, 160])  # fewer and more than inputs: the weight's gradient is computed either way
@pytest.mark.parametrize("apart", [False, True])
def test_product_and_gradients(outputs: int, apart: bool) -> None:
    x, weight, upstream = torch.randn(X), torch.randn(outputs, X[-1]), torch.randn(*X[:-1], outputs)
    if apart:  # rows that do not follow each other, as those of a part of a larger tensor
        x, weight, upstream = (torch.cat([each, each], dim=-1)[..., : each.shape[-1]] for each in (x, weight, upstream))
    assert products.takes(x, weight)
    found = with_gradients(x, weight, upstream, products.linear)
    exact = with_gradients(x.double(), weight.double(), upstream.double(), torch.nn.functional.linear)
    for mine, wanted in zip(found, exact, strict=True):
        assert mine.shape == wanted.shape
        torch.testing.assert_close(mine, wanted.float(), rtol=1e-5, atol=3e-6 * wanted.abs().max().item())


def test_only_the_gradient_that_is_wanted() -> None:
    """Of a frozen weight the input is not kept, and has its gradient."""
    x, weight = torch.randn(X), torch.randn(32, X[-1])
    out = products.linear(x.requires_grad_(), weight)
    assert [each is None for each in out.grad_fn.saved_tensors] == [True, False]
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(X), rtol=1e-5, atol=1e-5)
    out = products.linear(x.detach(), weight.requires_grad_())
    assert [each is None for each in out.grad_fn.saved_tensors] == [False, True]
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum((0, 1)).expand(32, -1), rtol=1e-5, atol=1e-3)


def test_few_numbers_and_other_formats_go_the_usual_way() -> None:
    x, weight = torch.randn(X), torch.randn(32, X[-1])
    assert products.takes(x, weight)
    assert not products.takes(x[:2], weight)
    assert not products.takes(x.bfloat16(), weight.bfloat16())
    assert not products.takes(x.double(), weight.double())
    assert not products.takes(x.to("meta"), weight.to("meta"))
    assert torch.equal(products.product(x[:2], weight), torch.nn.functional.linear(x[:2], weight))


@pytest.mark.parametrize(
    ("maker", "flags", "found"),
    [("GenuineIntel", "avx2 avx512f", False), ("AuthenticAMD", "avx2 avx512f", True), ("AuthenticAMD", "avx2", False)],
)
def test_where_it_pays(tmp_path: Path, maker: str, flags: str, found: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {maker}\nflags\t: {flags}\n")
    assert products.mkl_spares_instructions(tmp_path / "cpuinfo") is found
    assert not products.mkl_spares_instructions(tmp_path / "missing")
