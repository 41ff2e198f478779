"""The rows of tools/gpu_check.py: what each is called, what is wanted, how long it may take and where its code is.

Needs nothing but Python, so that rows can be listed, and their absence explained, on a machine that has no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "FAULT", "measured", "not run"]
BUDGET_S = 240.0  # of all rows together
KERNELS = ("digest",)  # of this package; each is a function of this name in gpu_check_kernels
COMPARED = tuple((kind, dtype) for kind in ("dense", "mixture") for dtype in ("float32", "bfloat16"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a row runs."""

    device: str  # cuda or cpu
    folder: Path  # for files, gone when the check has ended
    dry: bool  # tiny sizes, on a CPU; no bound on times and memory is held


@dataclass(frozen=True, slots=True)
class Found:
    """What a row found."""

    text: str
    holds: bool | None = None  # whether that is what is wanted; None: a number to know, without a bound


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `where` is `module:function`, called with a Place and `options`; it returns a Found."""

    name: str
    process: str  # rows of one name run in one child process, one after another
    where: str
    wanted: str
    limit_s: float  # after which its process is ended
    needs_gpu: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table as it came out."""

    name: str
    found: str
    wanted: str
    verdict: Verdict
    seconds: float = 0.0


def _compared(kind: str, dtype: str) -> Row:
    wanted = "as on the CPU" if dtype == "float32" else "no further from the CPU's than that is from float32"
    options = {"kind": kind, "dtype": dtype}
    return Row(f"trainer rank, {kind}, {dtype}", "rank", "gpu_check_rank:compare_row", wanted, 90, options=options)


ROWS: tuple[Row, ...] = (
    Row("machine", "kernels", "gpu_check_kernels:machine_row", "", 30),
    Row("copy bandwidth", "kernels", "gpu_check_kernels:copy_row", "", 20),
    *(
        Row(f"kernel {name}", "kernels", "gpu_check_kernels:kernel_row", "equal to its reference", 30, options={"name": name})
        for name in KERNELS
    ),
    Row("digest, time", "kernels", "gpu_check_kernels:digest_time_row", "", 30),
    Row("loss, no wait for the device", "kernels", "gpu_check_loss:sync_row", "none in any objective", 30, needs_gpu=True),
    Row("loss, 1 M tokens, forward", "kernels", "gpu_check_loss:forward_row", "at least 85 % of a copy", 20),
    Row("loss, 1 M tokens, backward", "kernels", "gpu_check_loss:backward_row", "at least 85 % of a copy", 20),
    Row("log-probs, 151,936 words", "kernels", "gpu_check_kernels:words_row", "time x 1.1, memory 1/8 of torch's at most", 30),
    Row("AdamW on the host", "kernels", "gpu_check_memory:adamw_row", "", 30),
    Row("weights handed to a process", "kernels", "gpu_check_groups:handover_row", "digests equal, also after a change", 80),
    Row("update group of two", "group", "gpu_check_groups:split_row", "waits for the second rank", 40, needs_gpu=True),
    Row("NCCL with one rank", "rank", "gpu_check_groups:one_rank_row", "every collective right", 40),
    *(_compared(kind, dtype) for kind, dtype in COMPARED),
    Row("weights exchanged with the host", "rank", "gpu_check_rank:exchange_row", "bit for bit", 20),
    Row("checkpoint saved and read", "rank", "gpu_check_rank:checkpoint_row", "log-probs equal, bit for bit", 30),
    Row("waits in a training step", "rank", "gpu_check_rank:waits_row", "", 20, needs_gpu=True),
    Row("optimizer on the host", "rank", "gpu_check_rank:offload_row", "as on the device", 40, needs_gpu=True),
    Row("memory that stays", "memory", "gpu_check_memory:resident_row", "within 10 % of ctpo plan", 40),
    Row("memory of a step", "memory", "gpu_check_memory:peak_row", "within 10 % of ctpo plan", 30, needs_gpu=True),
    Row("memory of a snapshot", "memory", "gpu_check_memory:snapshot_row", "", 40, needs_gpu=True),
)
