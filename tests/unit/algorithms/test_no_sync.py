"""`policy_loss`, forward and backward, never waits for the device: it reads no value, and copies nothing to or from the host.

Every call runs three times: on the CPU, where operations that read values or whose output's size depends on them are caught by
name; on the fake tensors of a device that does not exist, where torch itself refuses such operations and copies between host
and device show; and, where there is a GPU, on it, with CUDA's own check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ctpo_megatron.algorithms import LocalScan, Scan, Support, policy_loss
from ctpo_megatron.algorithms.critic import gae, value_loss
from ctpo_megatron.algorithms.distillation import Likeliest, distillation_loss
from ctpo_megatron.algorithms.objectives import OBJECTIVES
from ctpo_megatron.parallel import ContextParallelScan, context

REFUSED = (DataDependentOutputException, DynamicOutputShapeException, FakeTensorDeviceMismatchError)
FAKE_DEVICE = "lazy:0"  # autograd works on it without hardware, as it does not on a fake "cuda"
LENGTHS = (8, 40, 16, 8, 24)  # multiples of 2 * 4, for zigzag shards
CP_RANK, CP_SIZE = 1, 4
READS = {
    "_local_scalar_dense": "reads a value",
    "equal": "reads a value",
    "allclose": "reads a value",
    "is_nonzero": "reads a value",
    "nonzero": "the size of its output depends on values",
    "masked_select": "the size of its output depends on values",
    "_unique2": "the size of its output depends on values",
    "unique_dim": "the size of its output depends on values",
    "unique_consecutive": "the size of its output depends on values",
    "bincount": "the size of its output depends on values",
}


class HostSyncError(Exception):
    """An operation would wait for the device."""


class NoHostSync(TorchDispatchMode):
    """Raises HostSyncError at operations that wait for the device: reads of values, and copies between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS:
            raise HostSyncError(f"{func} {READS[name]}")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostSyncError(f"{func} without output_size: the size of its output depends on values")
        if name in ("index", "index_put_", "index_put") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise HostSyncError(f"{func} by a mask: the size of its output depends on values")
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != out.device.type:
                raise HostSyncError(f"{func} copies from {source.device} to {out.device}")
        return out


OFFENCES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask_index": lambda x: x[x > 0],
    "mask_assignment": lambda x: x.clone().index_put_((x > 0,), torch.zeros_like(x)[:1].sum()),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: torch.bincount(x.to(torch.int64)),
    "repeat_interleave": lambda x: x.repeat_interleave(x.to(torch.int64)),
    "slice_by_value": lambda x: x[: x.to(torch.int64)[0]],
}
COPIES: dict[str, Callable[[Tensor], Any]] = {
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "to": lambda x: x.to("cpu"),
    "to_with_dtype": lambda x: x.to("cpu", torch.float64),
    "copy": lambda x: torch.zeros(x.shape).copy_(x),
    "constant": lambda x: x + torch.tensor([1.0], device=x.device),
    "constant_moved": lambda x: x + torch.tensor([1.0]).to(x),
    "mixed_devices": lambda x: x + torch.ones(x.shape),
}


@pytest.fixture
def fake_device() -> Iterator[None]:
    """Tensors made inside have no memory; FAKE_DEVICE exists."""
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("name", OFFENCES)
def test_a_planted_read_is_caught(name: str) -> None:
    x = torch.ones(4)
    with pytest.raises(HostSyncError), NoHostSync():
        OFFENCES[name](x)


@pytest.mark.parametrize("name", OFFENCES | COPIES)
@pytest.mark.usefixtures("fake_device")
def test_a_planted_fault_is_caught_on_the_fake_device(name: str) -> None:
    x = torch.ones(4, device=FAKE_DEVICE)
    with pytest.raises((HostSyncError, *REFUSED)), NoHostSync():
        (OFFENCES | COPIES)[name](x)


@pytest.mark.parametrize("name", ["item", "nonzero", "mask_index", "repeat_interleave", "slice_by_value"])
@pytest.mark.usefixtures("fake_device")
def test_the_fake_device_itself_refuses_reads(name: str) -> None:
    """So an operation that `READS` forgets does not pass."""
    x = torch.ones(4, device=FAKE_DEVICE)
    with pytest.raises(REFUSED):
        OFFENCES[name](x)


def test_a_planted_read_in_the_backward_is_caught() -> None:
    x = torch.ones(4, requires_grad=True)
    x.register_hook(lambda grad: grad * grad.sum().item())
    with NoHostSync():
        loss = x.square().sum()
        with pytest.raises(HostSyncError):
            loss.backward()


CORRECTIONS: tuple[dict[str, Any], ...] = (
    *({"type": kind, "level": level} for kind in ("truncate", "mask") for level in ("token", "prefix", "sequence", "geometric")),
    {"type": "icepop"},
)
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "ctpo": (
        *({"ratio": "geomean"}, {"dual_clip": None}, {"power": 0.0}),
        *({"band": "variance"}, {"band": "entropy", "band_unit": 0.5}, {"band": "topk_variance"}, {"band": "topk_entropy"}),
    ),
    "kpop": ({"gate": "prefix_max"}, {"gate": "prefix_sum", "penalty": 0.1}),
    "grpo": ({"dual_clip": None},),
    "minpro": ({"form": "ppo"},),
    "dppo": ({"divergence": "binary_kl", "ratio_cap": None}, {"divergence": "topk_tv"}, {"divergence": "topk_kl"}),
    "cppo": ({"divergence": "topk_kl"}, {"adaptive_budget": True}),
    "trm": ({"divergence": "k2", "max_divergence": 0.05}, {"divergence": "topk_tv", "mean_divergence": None}),
}
AGGREGATIONS = ("token-mean", "sequence-mean", "sequence-sum", "balanced", {"type": "constant", "tokens": 100})


def calls() -> Iterator[dict[str, Any]]:
    """Arguments of `policy_loss`: every objective and variant, plain and with all else, every aggregation and correction."""
    for name in OBJECTIVES:
        for options in ({}, *VARIANTS.get(name, ())):
            yield {"objective": {"type": name, **options}}
        takes_corrections = name not in ("dppo", "cppo", "trm", "drpo", "kpop")
        more = {"correction": {"type": "truncate", "level": "prefix"}} if takes_corrections else {}
        yield {"objective": {"type": name}, "restarts": True, "aggregation": "balanced", "normalizer": 2.0} | more
    yield {"objective": {"type": "ctpo"}, "delight": {"max_surprisal": 5.0, "centred": True}}
    for aggregation in AGGREGATIONS:
        yield {"objective": {"type": "ctpo"}, "aggregation": aggregation}
    for correction in CORRECTIONS:
        yield {"objective": {"type": "ctpo"}, "correction": correction}


CALLS = list(calls())
CASES = [(call, scan) for call in CALLS for scan in ("local", "context_parallel") if scan == "local" or "restarts" in call]
IDS = ["-".join([scan, *(re.sub(r"\W+", "_", str(x)).strip("_") for x in call.values())]) for call, scan in CASES]


class Group:
    """All that `ContextParallelScan` asks of a process group."""

    def rank(self) -> int:
        return CP_RANK

    def size(self) -> int:
        return CP_SIZE


def gather_same(gathered: Tensor, mine: Tensor, group: Group) -> None:
    """In place of the collective: all ranks hold what this one does. Whether it waits for the device is the backend's affair."""
    gathered.view(group.size(), *mine.shape).copy_(mine)


@pytest.fixture
def gathered_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "all_gather_single", gather_same)


def inputs(device: str, tokens: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Everything a call may need: `tokens` local ones of sequences of these lengths."""
    sequences, gen = len(lengths), torch.Generator().manual_seed(3)

    def draw(*columns: int) -> Tensor:
        return -torch.rand(tokens, *columns, generator=gen).to(device)

    logp = draw()
    return {
        "old_logp": logp + 0.01 * draw(),
        "rollout_logp": logp + 0.01 * draw(),
        "logp": logp.requires_grad_(),
        "advantages": draw() + 0.5,
        "mask": draw() > -0.7,
        "restarts": draw() > -0.1,
        "support": Support(draw(4), draw(4)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device),
        "groups": (torch.arange(sequences) // 2).to(device),
        "sequence_ids": torch.arange(sequences).to(device),
    }


def step(case: tuple[dict[str, Any], str], device: str, lengths: Sequence[int] = LENGTHS) -> Callable[[], Tensor]:
    """A call and its backward, to be made; returns the gradient. Inputs and scan are there before."""
    call, where = case
    alone = where == "local"
    given = inputs(device, sum(lengths) // (1 if alone else CP_SIZE), lengths)
    given["restarts"] = given["restarts"] if "restarts" in call else None
    scan = LocalScan() if alone else ContextParallelScan(Group())

    def run() -> Tensor:
        policy_loss(**(call | given), scan=scan).loss.backward()
        return given["logp"].grad

    return run


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.usefixtures("gathered_alone")
def test_reads_no_value(case: tuple[dict[str, Any], str]) -> None:
    run = step(case, "cpu")
    with NoHostSync():
        grad = run()
    assert torch.isfinite(grad).all()
    assert grad.any()


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.usefixtures("gathered_alone", "fake_device")
def test_stays_on_the_device(case: tuple[dict[str, Any], str]) -> None:
    run = step(case, FAKE_DEVICE)
    with NoHostSync():
        grad = run()
    assert grad.device == torch.device(FAKE_DEVICE)


def critic_and_teacher(given: dict[str, Any], scan: Scan) -> None:
    """Advantages of a critic, its loss, and a teacher's, with their backwards."""
    mask, cu, logp = given["mask"], given["cu_seqlens"], given["logp"]
    at = {"mask": mask, "cu_seqlens": cu, "scan": scan}
    found = gae(rewards=given["advantages"], values=given["old_logp"], gamma=0.99, lam=0.9, **at)
    weights = given["advantages"][: cu.numel() - 1]
    of_value = value_loss(values=logp, old_values=given["old_logp"], returns=found.returns, weights=weights, **at)
    teacher = {"sampled_logp": given["old_logp"], "teacher_logp": given["rollout_logp"], "weights": weights}
    likeliest = Likeliest(given["support"].logp, given["support"].rollout_logp)
    sampled = distillation_loss(logp=logp, **teacher, **at)
    (of_value.loss + sampled.loss + distillation_loss(logp=logp, **teacher, **at, likeliest=likeliest).loss).backward()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("device", ["cpu", FAKE_DEVICE])
@pytest.mark.usefixtures("gathered_alone")
def test_critic_and_teacher_read_no_value(device: str, alone: bool) -> None:
    with FakeTensorMode() if device == FAKE_DEVICE else nullcontext():
        given = inputs(device, sum(LENGTHS) // (1 if alone else CP_SIZE), LENGTHS)
        scan = LocalScan() if alone else ContextParallelScan(Group())
        with NoHostSync():
            critic_and_teacher(given, scan)
        assert given["logp"].grad.device.type == torch.device(device).type


@pytest.mark.thorough
@pytest.mark.usefixtures("fake_device")
def test_a_million_tokens_stay_on_the_device() -> None:
    run = step((CALLS[0], "local"), FAKE_DEVICE, [1000] * 1000)
    with NoHostSync():
        grad = run()
    assert grad.shape == (1_000_000,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.usefixtures("gathered_alone")
def test_cuda_finds_no_synchronisation(case: tuple[dict[str, Any], str]) -> None:
    step(case, "cuda")()  # the first call of a kernel may load it
    run = step(case, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
