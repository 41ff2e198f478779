"""What prefix statistics under context parallelism cost, and what `policy_loss` costs, against what they replace.

    python tools/bench_scan.py                about ten minutes on two cores; the tables of docs/bench_scan.md
    python tools/bench_scan.py --repeats 3    a quick look

Ends with exit code 1, and says which, when a bound is missed. Everything that is compared runs interleaved in the same processes
with the same number of threads; a time is the least of several rounds' medians, since other work on the machine only adds to
it. Absolute times differ between machines; compare the ratios within one output.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from bench_loss import Check, memory_report, no_sync_report, speed_report
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctpo_megatron.algorithms import Channel
from ctpo_megatron.parallel import ContextParallelScan
from ctpo_megatron.parallel.gather import all_gather_single
from ctpo_megatron.parallel.layout import shard_indices

MIN_GATHER_RATIO = 10.0

CP_SIZES = (2, 4)
CP_PACKS = {"8 x 4k": (8, 4096), "32 x 1k": (32, 1024), "4 x 32k": (4, 32768)}


class Shard(NamedTuple):
    """One rank's zigzag shard of a pack of equal sequences, and what each way may know before it starts."""

    group: dist.ProcessGroup
    logp: Tensor  # [T / cp] with grad
    old_logp: Tensor  # [T / cp]
    mask: Tensor  # [T / cp] bool
    cu_seqlens: Tensor  # [N + 1]
    whole_mask: Tensor  # [T]; today's stacks keep masks whole on every rank
    order: Tensor  # [T], where the tokens of all ranks' shards, one after another, are in the pack
    mine: Tensor  # [T / cp], the same for this rank's shard


def make_shard(group: dist.ProcessGroup, sequences: int, length: int) -> Shard:
    gen = torch.Generator().manual_seed(7)
    logp = -torch.rand(sequences * length, generator=gen)
    old_logp = logp + 0.02 * torch.randn(sequences * length, generator=gen)
    mask = torch.rand(sequences * length, generator=gen) < 0.8
    cu = torch.arange(sequences + 1) * length
    places = [shard_indices(cu, rank, group.size()) for rank in range(group.size())]
    mine = places[group.rank()]
    return Shard(group, logp[mine].requires_grad_(), old_logp[mine], mask[mine], cu, mask, torch.cat(places), mine)


def by_scan(shard: Shard) -> Tensor:
    """CTPO's log-ratio [T / cp] as the package finds it: local scans and one gather of the pieces' totals."""
    d = torch.where(shard.mask, shard.logp.detach() - shard.old_logp, 0.0).clamp(-20, 20)
    scan = ContextParallelScan(shard.group)
    prefix, _position = scan.run([Channel(d), Channel(shard.mask.float())], shard.cu_seqlens)
    return prefix.values + (shard.logp - shard.logp.detach())


def whole_rows(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Plain prefix sums of whole rows, with the positions that CTPO's bounds need."""
    _position = torch.cumsum(mask, -1)
    return torch.cumsum(torch.where(mask, (logp - old_logp).clamp(-20, 20), 0.0), -1)


class SumOverRanks(torch.autograd.Function):
    """An all-reduce whose backward is an all-reduce, as torch.distributed.nn has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, x = group, x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def by_row_reductions(shard: Shard) -> Tensor:
    """Row by row, each stream padded with zeros and summed over the ranks; gradients return the same way.

    This is how slime and miles see whole rows: 2 collectives per sequence forward and 2 backward, as the padding asks for a
    gradient.
    """
    rank, size = shard.group.rank(), shard.group.size()
    rows = shard.cu_seqlens.numel() - 1
    piece = shard.logp.numel() // rows // 2

    def zeros(pieces: int) -> Tensor:
        return torch.zeros(pieces * piece, requires_grad=True)

    def whole(row: Tensor) -> Tensor:
        padded = [zeros(rank), row[:piece], zeros(2 * (size - 1 - rank)), row[piece:], zeros(rank)]
        return SumOverRanks.apply(torch.cat(padded), shard.group)

    found = []
    for logp, old_logp, mask in zip(
        shard.logp.chunk(rows), shard.old_logp.chunk(rows), shard.whole_mask.chunk(rows), strict=True
    ):
        prefix = whole_rows(whole(logp), whole(old_logp), mask)
        found += [prefix[rank * piece : (rank + 1) * piece], prefix[(2 * size - 1 - rank) * piece :][:piece]]
    return torch.cat(found)


def by_row_gathers(shard: Shard) -> Tensor:
    """Row by row, each stream all-gathered without a gradient: 2 collectives per sequence, none backward."""
    rank, size = shard.group.rank(), shard.group.size()
    rows = shard.cu_seqlens.numel() - 1
    piece = shard.logp.numel() // rows // 2

    def whole(row: Tensor) -> Tensor:
        gathered = gather(row, shard.group).view(size, 2, piece)
        return torch.cat([gathered[:, 0], gathered[:, 1].flip(0)]).view(-1)

    found = []
    streams = (shard.logp.detach(), shard.old_logp, shard.whole_mask)
    for logp, old_logp, mask in zip(*(stream.chunk(rows) for stream in streams), strict=True):
        prefix = whole_rows(whole(logp), whole(old_logp), mask)
        found += [prefix[rank * piece : (rank + 1) * piece], prefix[(2 * size - 1 - rank) * piece :][:piece]]
    return torch.cat(found) + (shard.logp - shard.logp.detach())


def by_stream_gathers(shard: Shard) -> Tensor:
    """The kindest form: one all-gather per stream for all sequences, the order of the tokens known before, no gradient."""
    streams = (shard.logp.detach(), shard.old_logp)
    whole = [torch.empty(shard.order.numel()).index_copy_(0, shard.order, gather(s, shard.group)) for s in streams]
    rows = shard.cu_seqlens.numel() - 1
    prefixes = [whole_rows(*row) for row in zip(*(s.chunk(rows) for s in (*whole, shard.whole_mask)), strict=True)]
    return torch.cat(prefixes)[shard.mine] + (shard.logp - shard.logp.detach())


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    gathered = x.new_empty(group.size() * x.numel())
    all_gather_single(gathered, x, group)
    return gathered


WAYS: dict[str, Callable[[Shard], Tensor]] = {
    "scan": by_scan,
    "rows, all-reduce": by_row_reductions,
    "rows, all-gather": by_row_gathers,
    "streams, all-gather": by_stream_gathers,
}


class CountCollectives(TorchDispatchMode):
    """Collectives as the process group is called, and the bytes of their results on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            results = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.calls, self.bytes = self.calls + 1, self.bytes + sum(x.nbytes for x in results)
        return func(*args, **(kwargs or {}))


def compare_ways(rank: int, size: int, rounds: int, repeats: int, folder: str) -> None:
    """One rank: every way on every pack; rank 0 writes what it found into `folder`."""
    torch.set_num_threads(1)
    store, bound = f"file://{folder}/store{size}", datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=bound)
    world, found = dist.group.WORLD, []
    if world is None:
        raise RuntimeError("torch.distributed has no default group")
    for pack, (sequences, length) in CP_PACKS.items():
        shard = make_shard(world, sequences, length)
        upstream = torch.randn(shard.logp.numel(), generator=torch.Generator().manual_seed(rank))
        counts = [count(way, shard, upstream) for way in WAYS.values()]
        elapsed = torch.tensor([[time_each(shard, upstream) for _ in range(repeats)] for _ in range(rounds)])
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)  # [rounds, repeats, ways]; a way takes as long as its slowest rank
        best = elapsed.median(dim=1).values.amin(dim=0).tolist()
        for name, (calls, size_in_bytes), seconds in zip(WAYS, counts, best, strict=True):
            found.append({"cp": size, "pack": pack, "way": name, "calls": calls, "bytes": size_in_bytes, "ms": 1e3 * seconds})
    if rank == 0:
        (Path(folder) / f"cp{size}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def count(way: Callable[[Shard], Tensor], shard: Shard, upstream: Tensor) -> tuple[int, int]:
    """Collectives and bytes of one forward and backward. Raises RuntimeError when the result is wrong."""
    with CountCollectives() as counted:
        found = way(shard)
        found.backward(upstream)
    rows = shard.cu_seqlens.numel() - 1
    whole = torch.zeros(shard.order.numel(), dtype=torch.float64)
    local = torch.where(shard.mask, shard.logp.detach() - shard.old_logp, 0.0).clamp(-20, 20)
    whole.index_copy_(0, shard.order, gather(local, shard.group).double())
    expected = torch.cumsum(whole.view(rows, -1), -1).view(-1)[shard.mine]
    error = (found.detach() - expected).abs().max().item()
    if error > 1e-4:
        raise RuntimeError(f"{way.__name__} is off by {error}")
    return counted.calls, counted.bytes


def time_each(shard: Shard, upstream: Tensor) -> list[float]:
    """Seconds of one forward and backward of every way, one after another."""
    seconds = []
    for way in WAYS.values():
        shard.logp.grad = None
        dist.barrier()
        begun = time.perf_counter()
        way(shard).backward(upstream)
        seconds.append(time.perf_counter() - begun)
    return seconds


def gathering_report(rounds: int, repeats: int) -> list[Check]:
    """Print the table of part (a)."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in CP_SIZES:
            mp.spawn(compare_ways, (size, rounds, repeats, folder), nprocs=size)
            rows += json.loads((Path(folder) / f"cp{size}.json").read_text())
    of = {(row["cp"], row["pack"], row["way"]): row for row in rows}
    print("| CP | pack | way | collectives | bytes | ms | times the scan's |\n|---|---|---|---|---|---|---|")
    for (cp, pack, way), row in of.items():
        ratio = row["ms"] / of[cp, pack, "scan"]["ms"]
        print(f"| {cp} | {pack} | {way} | {row['calls']} | {row['bytes']:,} | {row['ms']:.1f} | {ratio:.1f} |")
    slow = {way: of[4, "32 x 1k", way]["ms"] / of[4, "32 x 1k", "scan"]["ms"] for way in WAYS if way.startswith("rows")}
    per_sequence = [{of[cp, pack, "scan"]["bytes"] // n for pack, (n, _) in CP_PACKS.items()} for cp in CP_SIZES]
    least = MIN_GATHER_RATIO
    faster = [
        Check(f"32 x 1k, CP 4: {way} takes {ratio:.1f} times as long as the scan (at least {least:.0f})", ratio >= least)
        for way, ratio in slow.items()
    ]
    return [
        *faster,
        Check(f"bytes of the scan per sequence, one value per CP size: {per_sequence}", all(len(b) == 1 for b in per_sequence)),
        Check("the scan is one collective", all(of[cp, pack, "scan"]["calls"] == 1 for cp in CP_SIZES for pack in CP_PACKS)),
    ]


def main(
    rounds: Annotated[int, typer.Option(help="of which the best counts")] = 3,
    repeats: Annotated[int, typer.Option(help="per round, of which the median counts")] = 7,
) -> None:
    """Print the tables and the bounds."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread per process, load {os.getloadavg()[0]:.1f}\n")
    checks = gathering_report(rounds, repeats)
    print()
    checks += speed_report(rounds, repeats)
    print()
    checks += memory_report() + no_sync_report()
    print()
    for check in checks:
        print(f"{'holds ' if check.holds else 'MISSED'}  {check.text}")
    raise typer.Exit(0 if all(check.holds for check in checks) else 1)


if __name__ == "__main__":
    typer.run(main)
