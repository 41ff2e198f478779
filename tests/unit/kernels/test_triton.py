"""The Triton kernels against torch: in Triton's interpreter on a CPU, as compiled where there is a GPU.

The interpreter has to be chosen before Triton is imported: `TRITON_INTERPRET=1 python -m pytest` of this file, which
tests/processes/kernels does.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ctpo_megatron.algorithms.objectives.ctpo import loss as ctpo_loss
from ctpo_megatron.algorithms.operators import MAX, MIN, SUM, lift
from ctpo_megatron.algorithms.scan import Channel, LocalScan
from ctpo_megatron.algorithms.tokens import Tokens
from ctpo_megatron.parallel import vocab_parallel_logp

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The kernels' modules; skips where they would be compiled for a GPU that is not there."""
    if DEVICE == "cpu" and isinstance(triton.language.zeros, triton.runtime.JITFunction):
        pytest.skip("no GPU, and Triton was imported without its interpreter; tests/processes/kernels runs this file with it")
    from ctpo_megatron.kernels.triton import ctpo, linear, scan

    class Kernels:
        judge, linear_logp = staticmethod(ctpo.judge), staticmethod(linear.linear_logp)
        piece_scan, operators = staticmethod(scan.piece_scan), {SUM: scan.SUM, MIN: scan.MIN, MAX: scan.MAX}
        linear_module = linear

    return Kernels


LENGTHS = {"odd": [1, 0, 13, 37, 0, 5], "one block": [16, 16], "nothing": [], "empty pieces": [0, 0]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("operator", [SUM, MIN, MAX], ids=["sum", "min", "max"])
@pytest.mark.parametrize("restarted", [False, True])
def test_local_scan(kernels: Any, lengths: list[int], operator: Any, restarted: bool) -> None:
    drawn, tokens = torch.Generator().manual_seed(3), sum(lengths)
    values = torch.randn(tokens, generator=drawn) * 0.1
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    restarts = torch.rand(tokens, generator=drawn) < 0.15 if restarted else None
    (expected,) = LocalScan().run([Channel(values, operator, restarts=restarts)], bounds)
    state = lift(operator, values, exact=True)[0].to(DEVICE)
    flags = None if restarts is None else restarts.to(DEVICE)
    found = kernels.piece_scan(kernels.operators[operator], state, bounds.to(DEVICE), flags, block=16)
    if operator is SUM:
        found = found.double() * 2.0**-38
    assert torch.equal(found.float().cpu(), expected.values)


def test_sums_that_would_round_are_refused(kernels: Any) -> None:
    with pytest.raises(ValueError, match=r"not of torch\.float32"):
        kernels.piece_scan(0, torch.ones(4), torch.tensor([0, 4]))


OPTIONS = [
    {"ratio": ratio, "clip_low": 0.025, "clip_high": 0.05, "dual_clip": dual, "power": power}
    for ratio, dual, power in itertools.product(("cumulative", "geomean"), (0.05, None), (0.5, 0.0, 1.0, -0.5))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("tokens", [0, 1, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ctpo(kernels: Any, options: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    """Loss and gradient of torch's form, whose bounds few tokens are near; advantages in both number formats."""
    drawn = torch.Generator().manual_seed(11)
    mask = torch.rand(tokens, generator=drawn) < 0.8
    advantages = torch.randn(tokens, generator=drawn).sign().to(dtype)
    position = torch.randint(1, 3000, (tokens,), generator=drawn).float()
    prefix = torch.randn(tokens, generator=drawn) * 0.06 * position.sqrt()
    prefix[:10] = 12.0  # beyond what is held
    logp = torch.zeros(tokens, requires_grad=True)
    given = Tokens(logp, logp.detach(), torch.where(mask, advantages, 0.0).float(), mask, prefix, position, position, {})
    out = ctpo_loss(given, band="position", band_unit=None, **options)
    out.loss.sum().backward()
    hidden = torch.where(mask, advantages, torch.nan)
    found = kernels.judge(*(each.to(DEVICE) for each in (prefix, position, hidden, mask)), **options)
    assert logp.grad is not None
    expected = (torch.where(mask, out.loss.detach(), 0.0), torch.where(mask, logp.grad, 0.0))
    for ours, theirs in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)
    fate = out.high + 2 * out.low.int() + (0 if out.dual is None else 4 * out.dual.int())
    assert torch.equal(found.fate.cpu().int()[mask], fate.int()[mask])
    torch.testing.assert_close(found.held.cpu()[mask], out.log_ratio.detach()[mask], rtol=1e-6, atol=0)


SIZES = {"odd": (37, 203, 24), "tiles": (64, 64, 32), "one": (1, 1, 1), "nothing": (0, 70, 8)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"])
def test_log_probs(
    kernels: Any, size: tuple[int, int, int], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.linear_module, "HELD", 1)  # more than one block of words in the backward
    (tokens, words, width), drawn = size, torch.Generator().manual_seed(7)
    hidden = torch.randn(tokens, width, generator=drawn).to(dtype)
    weight = (torch.randn(words, width, generator=drawn) * 2 * width**-0.5).to(dtype)
    labels, upstream = torch.randint(0, words, (tokens,), generator=drawn), torch.randn(tokens, generator=drawn)
    ours = _gradients(lambda h, w: kernels.linear_logp(h, w, labels.to(DEVICE), 0.8), hidden, weight, upstream)

    def by_torch(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        found = vocab_parallel_logp(h.float(), w.float(), labels.to(DEVICE), temperature=0.8)
        assert found.entropy is not None
        return found.logp, found.entropy

    theirs = _gradients(by_torch, hidden, weight, upstream)
    for name, mine, known in zip(("logp", "entropy", "hidden", "weight"), ours, theirs, strict=True):
        scale = max(float(known.float().abs().max()), 1e-3) if known.numel() else 1.0
        torch.testing.assert_close(
            mine / scale, known / scale, rtol=0, atol=tolerance, check_dtype=False, msg=lambda t, n=name: n + t
        )


def _gradients(way: Any, hidden: Tensor, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    """Log-probs, entropy, and the gradients of hidden states and weight."""
    given = [each.to(DEVICE).clone().requires_grad_() for each in (hidden, weight)]
    logp, entropy = way(*given)
    gradients = torch.autograd.grad(logp, given, upstream.to(DEVICE))
    return [each.detach().float().cpu() for each in (logp, entropy, *gradients)]
