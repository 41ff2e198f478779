"""The second part of tools/bench_scan.py: `policy_loss` on one device against a dense reference on padded tensors."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Stats, fused, policy_loss
from ctpo_megatron.algorithms.objectives import OBJECTIVES

TOKENS = 1_000_000
ON_ROLLOUT = ("dppo", "cppo", "trm", "drpo", "kpop")  # take their ratio against the engine's log-probs
MAX_FLOATS = {"ctpo": 6.0, "grpo": 6.0, "cppo": 9.0, "trm": 9.0}
MAX_OTHER_FLOATS = 12.0
MIN_BARE_RATIO = 1.0  # of the reference without statistics
MIN_LONG_TAIL_RATIO = 3.0
MIN_EQUAL_RATIO = 1.0
TOLERANCE = 1e-5


class Check(NamedTuple):
    """A bound and whether it holds."""

    text: str
    holds: bool


class Pack(NamedTuple):
    """Packed sequences, and the same padded to the longest."""

    packed: dict[str, Tensor]  # what policy_loss takes
    padded: dict[str, Tensor]  # [B, Tmax]
    place: Tensor  # [T], of packed tokens among the padded


def make_pack(lengths: list[int]) -> Pack:
    gen = torch.Generator().manual_seed(11)
    tokens, rows, longest = sum(lengths), len(lengths), max(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    row = torch.arange(rows).repeat_interleave(torch.tensor(lengths))
    logp = -torch.rand(tokens, generator=gen)
    streams = {
        "logp": logp,
        "old_logp": logp + 0.02 * torch.randn(tokens, generator=gen),
        "advantages": torch.randn(rows, generator=gen)[row],
        "mask": torch.rand(tokens, generator=gen) < 0.8,
    }
    place = row * longest + torch.arange(tokens) - cu[row]
    padded = {
        name: torch.zeros(rows * longest, dtype=s.dtype).index_copy_(0, place, s).view(rows, longest)
        for name, s in streams.items()
    }
    return Pack(streams | {"cu_seqlens": cu}, padded, place)


def long_tail() -> list[int]:
    """Lengths with a log-normal tail up to 32k, of 1 M tokens in all."""
    gen = torch.Generator().manual_seed(13)
    lengths, left = [], TOKENS
    while left:
        drawn = math.exp(7.3 + 1.1 * torch.randn((), generator=gen).item())
        lengths.append(min(left, max(16, min(32768, int(drawn)))))
        left -= lengths[-1]
    return lengths


PACKS = {"1000 x 1000": [1000] * 1000, "244 x 4096": [4096] * 244, "long tail": long_tail()}


def dense_ctpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, record: bool) -> tuple[Tensor, list[Tensor]]:
    """CTPO as its authors define it on padded [B, T], float32, by plain autograd; and the statistics `policy_loss` reports.

    arXiv 2605.07331; mean over sequences of token means.
    """
    d = (logp - old_logp).clamp(-20, 20)
    ones = mask.to(d.dtype)
    prefix = torch.cumsum(d.detach() * ones, -1)
    log_ratio = (prefix + (logp - logp.detach())).clamp(max=10)
    position = torch.cumsum(ones, -1)
    scale = position.clamp(min=1).sqrt()
    low, high = -0.025 * scale, 0.05 * scale
    ratio = torch.where(mask, log_ratio.exp(), 0.0)
    within = torch.where(mask, torch.maximum(torch.minimum(log_ratio, high), low).exp(), 0.0)
    pessimistic = torch.maximum(-advantages * ratio, -advantages * within)
    ceiling = -advantages * torch.where(mask, (0.05 * scale).exp(), 1.0)
    loss = torch.where(advantages < 0, torch.minimum(ceiling, pessimistic), pessimistic)
    length = ones.sum(-1)
    mean = (torch.where(mask, loss, 0.0).sum(-1) / length.clamp(min=1)).sum() / (length > 0).sum()
    if not record:
        return mean, []
    with torch.no_grad():
        negative = advantages < 0
        clips = [(log_ratio > high) & (advantages > 0), (log_ratio < low) & negative, (pessimistic > ceiling) & negative]
        sums = dense_sums(d, log_ratio, ratio, mask, [clip & mask for clip in clips])
        return mean, sums + dense_health(prefix, position, length, mask, clips[0] | clips[1] | clips[2])


def dense_sums(d: Tensor, log_ratio: Tensor, ratio: Tensor, mask: Tensor, clips: list[Tensor]) -> list[Tensor]:
    """What `algorithms.statistics` reports of the tokens, as float64 sums."""
    counts = [mask.sum(), *(clip.sum() for clip in clips), (clips[0] | clips[1] | clips[2]).sum()]
    moments = [x.sum(dtype=torch.float64) for x in (ratio, ratio.square(), torch.where(mask, d, 0.0))]
    square = torch.where(mask, log_ratio, 0.0).square().sum(dtype=torch.float64)
    return [*counts, *moments, square, ratio.amax(), torch.where(mask, ratio, torch.inf).amin()]


def dense_health(prefix: Tensor, position: Tensor, length: Tensor, mask: Tensor, clipped: Tensor) -> list[Tensor]:
    """What `algorithms.health` reports: sums by powers of two of the position, and by tenths of the sequence."""
    chosen = mask.view(-1).nonzero().squeeze(1)
    prefix, position, clipped = prefix.view(-1)[chosen], position.view(-1)[chosen], clipped.view(-1)[chosen]
    by_bin = (position.log2() + 1e-6).int().clamp(max=15)
    tenth = ((position - 1) * 10 / length.repeat_interleave(mask.sum(-1))).int()
    sums = [by_bin.bincount(weights, 16) for weights in (None, position, prefix, prefix.square())]
    return [*sums, tenth.bincount(None, 10), tenth.bincount(clipped.double(), 10)]


Step = Callable[[], tuple[Tensor, Tensor | None, Any]]  # loss, gradient, statistics


def packed_step(pack: Pack, objective: str, **more: Any) -> Step:
    """`policy_loss` and its backward: loss, gradient [T], statistics."""
    logp = pack.packed["logp"].clone().requires_grad_()
    streams = {**pack.packed, "logp": logp, **more}

    def step() -> tuple[Tensor, Tensor | None, Stats]:
        logp.grad = None
        out = policy_loss({"type": objective}, **streams)
        out.loss.backward()
        return out.loss.detach(), logp.grad, out.stats

    return step


def padded_step(pack: Pack, record: bool) -> Step:
    """The dense reference and its backward: loss, gradient [B, T], statistics."""
    logp = pack.padded["logp"].clone().requires_grad_()
    streams = {**pack.padded, "logp": logp}

    def step() -> tuple[Tensor, Tensor | None, list[Tensor]]:
        logp.grad = None
        loss, sums = dense_ctpo(**streams, record=record)
        loss.backward()
        return loss.detach(), logp.grad, sums

    return step


def best_medians(steps: list[Callable[[], Any]], rounds: int, repeats: int) -> list[float]:
    """CPU seconds of each, of all threads, measured in turn: the least of the rounds' medians. By one thread it takes so long."""
    medians = []
    for _ in range(rounds):
        seconds: list[list[float]] = [[] for _ in steps]
        for _ in range(repeats):
            for step, taken in zip(steps, seconds, strict=True):
                begun = time.process_time()
                step()
                taken.append(time.process_time() - begun)
        medians.append([statistics.median(taken) for taken in seconds])
    return [min(taken) for taken in zip(*medians, strict=True)]


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most that the step's tensors held at one time beyond what was there before."""
    step()  # what is kept from the first call on is not the step's
    with quiet_stderr(), torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        kept = step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler's native libraries tell on stderr that there is no GPU."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """Inside, `policy_loss` is computed by torch, whatever its size."""
    with patch.object(fused, "FEWEST", 2**62):
        yield


def speed_report(rounds: int, repeats: int) -> list[Check]:
    """Print the table of times of part (b)."""
    checks = []
    print("| pack | padded / packed | threads | packed, s | by torch, s | padded, s | without statistics, s | times the packed |")
    print("|---|---|---|---|---|---|---|---|")
    for name, lengths in PACKS.items():
        pack = make_pack(lengths)
        packed_way = packed_step(pack, "ctpo")
        steps = [packed_way, by_torch()(packed_way), padded_step(pack, record=True), padded_step(pack, record=False)]
        checks += [same_loss(name, pack, way, steps[2]) for way in steps[:2]]
        waste = pack.padded["logp"].numel() / sum(lengths)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed, torchs, padded, bare = best_medians(steps, rounds, repeats)
            times = ", ".join(f"{each / packed:.2f}" for each in (torchs, padded, bare))
            seconds = " | ".join(f"{each:.3f}" for each in (packed, torchs, padded, bare))
            print(f"| {name} | {waste:.1f} | {threads} | {seconds} | {times} |")
            least = MIN_LONG_TAIL_RATIO if waste > 1.01 else MIN_EQUAL_RATIO
            text = f"{name}, threads {threads}: padded takes {padded / packed:.2f} times as long (at least {least:.0f})"
            checks.append(Check(text, padded / packed >= least))
            text = f"{name}, threads {threads}: padded without statistics takes {bare / packed:.2f} times as long (at least 1)"
            checks.append(Check(text, bare / packed >= MIN_BARE_RATIO))
        torch.set_num_threads(1)
    return checks


def same_loss(name: str, pack: Pack, packed_step: Step, padded_step: Step) -> Check:
    """That both compute the same: loss, gradient and number of clipped tokens."""
    packed, padded = packed_step(), padded_step()
    if packed[1] is None or padded[1] is None:
        raise RuntimeError("a step left no gradient")
    loss = abs(packed[0].item() - padded[0].item())
    expected = padded[1].view(-1)[pack.place]
    grad = ((packed[1] - expected).abs().sum() / expected.abs().sum()).item()
    clipped = abs(packed[2].means["clip_fraction"].total.item() - padded[2][4].item())
    text = f"{name}: losses differ by {loss:.1e}, gradients by {grad:.1e} of their size, clipped tokens by {clipped:.0f}"
    return Check(text, max(loss, grad) <= TOLERANCE and clipped <= TOLERANCE * TOKENS)


def memory_report() -> list[Check]:
    """Print the table of the memory that each objective takes."""
    pack = make_pack(PACKS["1000 x 1000"])
    rollout = {"rollout_logp": pack.packed["old_logp"] + 0.01}
    restarts = torch.zeros(TOKENS, dtype=torch.bool)
    restarts[500::1000] = True
    more = {"correction": {"type": "truncate", "level": "prefix"}, "restarts": restarts, "aggregation": "balanced"}
    more |= {"groups": torch.arange(1000) // 8, **rollout}
    reference = "padded dense reference"
    cases = {name: packed_step(pack, name, **(rollout if name in ON_ROLLOUT else {})) for name in OBJECTIVES}
    cases["ctpo, prefix correction, restarts, balanced"] = packed_step(pack, "ctpo", **more)
    cases[reference] = padded_step(pack, record=True)
    found = {name: (floats_of(step), floats_of(by_torch()(step))) for name, step in cases.items()}
    print("| objective | floats per token | by torch |\n|---|---|---|")
    for name, (floats, torchs) in found.items():
        print(f"| {name} | {floats:.1f} | {torchs:.1f} |")
    del found[reference]
    most = {name: MAX_FLOATS.get(name, MAX_OTHER_FLOATS) for name in found}
    return [
        Check(f"{name}: {floats:.2f} floats per token (at most {most[name]:.0f})", floats <= most[name])
        for name, (floats, _) in found.items()
    ]


def floats_of(step: Callable[[], Any]) -> float:
    """The peak in floats of 4 bytes per token: torch's allocations and numpy's, which torch does not see."""
    tracemalloc.start()
    try:
        step()  # what is kept from the first call on is not the step's
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        step()
        outside = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return (peak_bytes(step) + outside) / 4 / TOKENS


def no_sync_report() -> list[Check]:
    """Run the test that looks for host synchronisation, in every objective and also on 1 M tokens."""
    test = Path(__file__).resolve().parents[1] / "tests" / "unit" / "algorithms" / "test_no_sync.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(test)], capture_output=True, text=True, cwd=test.parents[3])
    said = done.stdout.strip().splitlines()
    return [Check(f"no host synchronisation: {test.name}, {said[-1] if said else done.stderr}", done.returncode == 0)]
