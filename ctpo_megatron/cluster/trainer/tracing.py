"""One rank's part in a trace: its spans, and where asked for torch's profiler and memory snapshot."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpo_megatron.errors import reason
from ctpo_megatron.record.heartbeat import Stages
from ctpo_megatron.record.spans import Span, Spans, around, follow

if TYPE_CHECKING:  # after the variables that torch and megatron read are set
    from ctpo_megatron.mcore.rank import TrainerRank

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MEMORY_ENTRIES = 1_000_000  # allocations and frees of which torch keeps the newest


@dataclass(frozen=True, slots=True)
class RankTrace:
    """What a rank gathered. `lost`: what of it could not be made, and why."""

    spans: list[Span] = field(default_factory=list)
    left_out: int = 0
    lost: list[str] = field(default_factory=list)


def read_clock() -> tuple[int, str]:
    """Returns this process's monotonic clock in nanoseconds, and which start of which host it belongs to."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = BOOT_ID.read_text().strip()
    return time.monotonic_ns(), boot


class RankTracer:
    """Traces a rank from its making to `end`. `profile`, `memory`: the files that are asked for besides."""

    def __init__(self, rank: TrainerRank, stages: Stages, profile: Path | None, memory: Path | None) -> None:
        self._spans, self._lost = Spans(), list[str]()
        self._profile, self._memory = profile, memory
        self._profiler: Any = None
        self._ends: list[Callable[[], None]] = []
        for start in (self._start_profiler, self._start_memory, partial(self._follow, rank, stages)):
            self._tried(start)

    def _follow(self, rank: TrainerRank, stages: Stages) -> None:
        from ctpo_megatron.mcore.tracing import trace_rank
        from ctpo_megatron.weights.transports.prefetch import SendAccount

        self._ends.append(follow(stages, self._spans))
        self._ends.append(trace_rank(rank, self._spans))
        self._ends.append(around(SendAccount, "next", self._spans, "gather the next bucket"))
        self._ends.append(around(SendAccount, "finish", self._spans, "finish digests"))

    def end(self) -> RankTrace:
        """Stop, write what goes to files of its own, and return the spans."""
        now = time.monotonic_ns()
        for each in reversed(self._ends):
            each()
        for stop in (self._stop_profiler, self._stop_memory):
            self._tried(stop)
        return RankTrace(self._spans.between(0, now), self._spans.left_out, self._lost)

    def _tried(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - no step is lost for a trace
            self._lost.append(reason(error))

    def _start_profiler(self) -> None:
        if self._profile is not None:
            import torch

            self._profile.parent.mkdir(exist_ok=True)
            profiler = torch.profiler.profile(profile_memory=True)  # of what there is here: CPU, and CUDA
            profiler.start()
            self._profiler = profiler

    def _stop_profiler(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._profile))

    def _start_memory(self) -> None:
        if self._memory is None:
            return
        import torch

        if not torch.cuda.is_available():
            self._memory = None
            raise RuntimeError("trace.memory records what is allocated on a GPU, and this rank has none")
        self._memory.parent.mkdir(exist_ok=True)
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)

    def _stop_memory(self) -> None:
        if self._memory is not None:
            import torch

            torch.cuda.memory._dump_snapshot(str(self._memory))
            torch.cuda.memory._record_memory_history(enabled=None)
