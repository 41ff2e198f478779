"""Rows of tools/gpu_check.py about single kernels: copy, digest, log-probs of words. One process, no process groups."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from gpu_check_measure import copy_seconds, median_seconds, peak_bytes
from gpu_check_rows import Found, Place
from torch import Tensor

from ctpo_megatron.engine import digest

GB = 10**9
MAX_WORDS_TIME, MAX_WORDS_MEMORY = 1.1, 1 / 8  # as tools/bench_train.py has them on a CPU


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a device computes, and the reference on the CPU; both take the same cases and must be equal."""

    cases: dict[str, tuple[Any, ...]]
    compute: Callable[..., Any]  # with tensors on the device
    reference: Callable[..., Any]  # with tensors on the CPU
    reference_name: str


def machine_row(place: Place) -> Found:
    """The device, and the versions of what computes on it."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"{os.cpu_count()} processors"]
    if place.device == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found = [torch.cuda.get_device_name(), *found, f"CUDA {torch.version.cuda}", f"NCCL {nccl}"]
    lacks = [name for name in ("transformer_engine", "apex", "triton") if importlib.util.find_spec(name) is None]
    return Found(", ".join(found) + (f"; without {', '.join(lacks)}" if lacks else ""))


def copy_row(place: Place) -> Found:
    """Bytes a second of a copy within the device, read and written."""
    nbytes = 2**20 if place.dry else 2**32
    return Found(f"{nbytes / copy_seconds(nbytes, place.device) / 1e12:.3f} TB/s")


def kernel_row(place: Place, name: str) -> Found:
    """Whether the kernel called `name` agrees with its reference in every case."""
    return compare_kernel(_KERNELS[name](), place)


def compare_kernel(kernel: Kernel, place: Place) -> Found:
    """The cases in which a kernel and its reference differ."""
    wrong = []
    for case, arguments in kernel.cases.items():
        moved = [a.to(place.device) if isinstance(a, Tensor) else a for a in arguments]
        if kernel.compute(*moved) != kernel.reference(*arguments):
            wrong.append(case)
    of = f"of {len(kernel.cases)} cases against {kernel.reference_name}"
    return Found(f"differs in {len(wrong)} {of}: {', '.join(wrong)}" if wrong else f"equal in all {of}", not wrong)


def digest_kernel() -> Kernel:
    """The digest of a tensor's bytes: torch's path, which GPUs take, against numba's on the CPU."""
    generator = torch.Generator().manual_seed(5)
    cases: dict[str, tuple[Any, ...]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        for shape in ((1000,), (37, 129), (2, 7, 65), (300, 4096)):
            drawn = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
            values = drawn.view(dtype).squeeze(-1)
            cases[f"{dtype} {shape}"] = (values,)
            cases[f"{dtype} {shape} at row 3, column 5"] = (values, 3, 5)
    cases["a column of a matrix"] = (cases["torch.float32 (37, 129)"][0][:, 1:70], 0, 1)
    cases["NaN and -0"] = (torch.tensor([float("nan"), -0.0, 0.0]),)
    has_numba = digest._compiled() is not None
    return Kernel(cases, _digest_by_torch, digest.tensor_digest, "numba" if has_numba else "torch on the CPU (numba is missing)")


_KERNELS: dict[str, Callable[[], Kernel]] = {"digest": digest_kernel}


def _digest_by_torch(*arguments: Any) -> int:
    with torch_path():
        return digest.tensor_digest(*arguments)


@contextlib.contextmanager
def torch_path() -> Iterator[None]:
    """Inside it a digest goes torch's way on a CPU too, as it does on a GPU."""
    with patch.object(digest, "_compiled", lambda: None):
        yield


def digest_time_row(place: Place) -> Found:
    """Time of digests of a bucket, by size and by tensor, on the device and on the CPU."""
    rows, width, count = (64, 64, 4) if place.dry else (2048, 4096, 64)  # 64 tensors of 16 MiB
    bucket = torch.ones(count, rows, width, dtype=torch.bfloat16, device=place.device)
    small = torch.ones(256, dtype=torch.bfloat16, device=place.device)  # one norm's weight: all that is not bandwidth
    gigabytes = bucket.nbytes / GB

    def whole() -> list[int]:
        return [digest.tensor_digest(tensor) for tensor in bucket]

    device_s, small_s = median_seconds(whole, place.device, repeats=3), median_seconds(lambda: digest.tensor_digest(small), "cpu")
    host = bucket[:4].cpu()
    digest.tensor_digest(small.cpu())  # compiled at the first call
    begun = time.perf_counter()
    on_host = [digest.tensor_digest(tensor) for tensor in host]
    host_s = (time.perf_counter() - begun) * count / len(host)
    share = copy_seconds(bucket.nbytes, place.device) / device_s
    text = f"{device_s / gigabytes:.3f} s/GB on the device ({share:.0%} of a copy's speed), {host_s / gigabytes:.3f} on the CPU; "
    return Found(text + f"{small_s * 1e3:.3f} ms for a small tensor", None if whole()[: len(host)] == on_host else False)


def words_row(place: Place) -> Found:
    """Log-probs of labels from hidden states, forward and backward, against torch's with all logits."""
    from ctpo_megatron.parallel import vocab_parallel_logp

    tokens, width, words = (64, 32, 1000) if place.dry else (4096, 2048, 151_936)
    dtype = torch.float32 if place.dry else torch.bfloat16
    generator = torch.Generator(place.device).manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=place.device)

    hidden, weight = draw(tokens, width).to(dtype), (draw(words, width) * width**-0.5).to(dtype)
    labels = torch.randint(0, words, (tokens,), generator=generator, device=place.device)
    upstream = draw(tokens)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step(way: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        logp = way()
        return logp.detach(), *torch.autograd.grad(logp, (hidden, weight), upstream)

    def ours() -> tuple[Tensor, ...]:
        return step(lambda: vocab_parallel_logp(hidden, weight, labels).logp)

    def torchs() -> tuple[Tensor, ...]:  # all logits in float32, as most trainers have them
        return step(lambda: torch.log_softmax((hidden @ weight.t()).float(), -1).gather(-1, labels[:, None]).squeeze(-1))

    pairs = zip(ours(), torchs(), strict=True)
    error = max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)
    time_ratio = median_seconds(ours, place.device, repeats=5) / median_seconds(torchs, place.device, repeats=5)
    text, close = f"time x {time_ratio:.2f}, differs by {error:.1e} of the largest", error < (1e-4 if place.dry else 3e-2)
    if place.device != "cuda":
        return Found(text, None if close else False)
    results = hidden.nbytes + weight.nbytes  # both ways return these gradients
    memory = (peak_bytes(ours) - results) / (peak_bytes(torchs) - results)
    return Found(f"{text}, memory x {memory:.3f}", close and time_ratio <= MAX_WORDS_TIME and memory <= MAX_WORDS_MEMORY)
