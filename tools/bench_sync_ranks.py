"""What the processes of tools/bench_sync.py do: two ranks of a trainer that publish, and one that receives bare broadcasts."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport, DiskTransport, Transport
from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.engine.control import ServerControl
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.http import Requests
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.engine.processes import group_members
from ctpo_megatron.mcore.hf.buffers import BucketMemory
from ctpo_megatron.mcore.hf.load import unwrap
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.owners import make_buckets, nbytes
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.weights.proof.canary import TOLERANCE, join_canary
from ctpo_megatron.weights.protocol import Bucket, Sent, Server
from ctpo_megatron.weights.publisher import Proof, WeightPublisher
from ctpo_megatron.weights.source import RankWeights
from ctpo_megatron.weights.transports.choose import make_sender

HOST = "127.0.0.1"
TP = 2  # of the trainer
RANKS = TP + 1
TIMEOUT_S = 300.0

Row = dict[str, Any]
PHASES = ("total", "prepare", "paused", "pause", "connect", "transfer", "gather", "digest", "send", "write", "attest", "canary")


@dataclass(frozen=True)
class Task:
    """What all ranks are given."""

    model: str
    dtype: str
    bucket_mb: int
    repeats: int
    changed: int  # tensors that a delta brings
    url: str
    key: str
    server: int  # process group
    directory: str  # for files
    bare_port: int
    ways: tuple[str, ...]


class Trainer:
    """`publisher.WeightSource` over the ranks of this bench. Rank 0 is the driver too, the others `follow` it."""

    def __init__(self, rank: TrainerRank, task: Task) -> None:
        self.rank, self._task = rank, task
        self._buckets = BucketMemory(torch.device("cpu"))
        self._weights: RankWeights | None = None
        self.sent = Sent(0)  # by this rank, at last
        self.memory = 0  # bytes for buckets: those kept, and by which this rank grew at most while it sent
        self.cpu_s: list[float] = []  # by rank, of the last publication

    @property
    def weights(self) -> RankWeights:
        """On their way by the transport in use."""
        if self._weights is None:
            raise ValueError("use() comes first")
        return self._weights

    async def connect(self, servers: list[Server], api_key: str) -> None:
        await asyncio.to_thread(self.everywhere, "join", servers, api_key)

    async def prepare(self, version: int) -> None:
        await asyncio.to_thread(self.everywhere, "begin", version)

    async def publish(self, version: int) -> Sent:
        return await asyncio.to_thread(self.everywhere, "send", version)

    async def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        return await asyncio.to_thread(self.everywhere, "logp", token_ids, experts)

    def everywhere(self, what: str, *arguments: Any) -> Any:
        """Let all ranks do it. Returns what it gave on rank 0."""
        dist.broadcast_object_list([what, arguments], src=0)
        return getattr(self, what)(*arguments)

    def follow(self) -> None:
        """Do what rank 0 does, until it stops."""
        while True:
            order: list[Any] = [None, None]
            dist.broadcast_object_list(order, src=0)
            if order[0] == "stop":
                return
            getattr(self, order[0])(*order[1])

    def use(self, transport: Transport) -> None:
        """Publish by `transport` from now on; buckets lie in the same memory whatever the transport."""
        self.leave()
        self._weights = RankWeights(self.rank, transport, tp=1, address=HOST, memory=self._buckets)

    def leave(self) -> None:
        if self._weights is not None:
            self._weights.close()

    def join(self, servers: list[Server], api_key: str) -> None:
        self.weights.connect(servers, api_key)

    def begin(self, version: int) -> None:
        self.weights.prepare(version)

    def send(self, version: int) -> Sent:
        begin, kept = time.process_time(), self._buckets.nbytes
        with extra_memory() as found:
            self.sent = self.weights.publish(version)
        self.memory, self.cpu_s = kept + found[0], [0.0] * TP
        dist.all_gather_object(self.cpu_s, time.process_time() - begin)
        return self.sent

    def logp(self, token_ids: list[int], experts: Experts | None) -> list[float]:
        return join_canary([self.weights.canary_logp(token_ids, experts)], len(token_ids))

    @torch.no_grad()
    def change(self, count: int) -> None:
        """Turn the signs of `count` tensors: output projections and down-projections in turn, of layers here and there."""
        model: Any = unwrap(self.rank.models[0])  # torch types every attribute of a module as a tensor or a module
        layers = model.decoder.layers
        for number in range(count):
            layer = layers[number * len(layers) // count]
            (layer.mlp.linear_fc2 if number % 2 else layer.self_attention.linear_proj).weight.neg_()


@contextmanager
def extra_memory() -> Iterator[list[int]]:
    """Bytes by which this process's resident memory rose at most during the body; filled in at its end."""
    found = [0]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is from now on
    before = psutil.Process().memory_info().rss
    yield found
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found[0] = max(0, 1024 * int(line.split()[1]) - before)


def cpu_of(group: int) -> float:
    """CPU seconds of a process group so far."""
    times = [psutil.Process(pid).cpu_times() for pid in group_members(group)]
    return sum(each.user + each.system for each in times)


class TimedControl(ServerControl):
    """Notes when each call began and ended, and what the server's processes computed in between."""

    def __init__(self, requests: Requests, server: int) -> None:
        super().__init__(requests)
        self.begins: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}
        self.cpu_at: dict[str, float] = {}
        self._server = server

    async def _note(self, name: str, call: Awaitable[Any]) -> Any:
        self.begins[name], cpu = time.monotonic(), cpu_of(self._server)
        result = await call
        self.ends[name], self.cpu_at[name] = time.monotonic(), cpu_of(self._server)
        self.cpu_s[name] = self.cpu_at[name] - cpu
        return result

    def seconds(self, first: str, last: str = "") -> float:
        """From the beginning of one call to the end of another, or of itself."""
        return self.ends.get(last or first, 0.0) - self.begins.get(first, 0.0)

    async def pause(self, url: str, **bound: Any) -> None:
        await self._note("pause", super().pause(url, **bound))

    async def resume(self, url: str, **bound: Any) -> None:
        await self._note("resume", super().resume(url, **bound))

    async def open_update(self, url: str, **bound: Any) -> None:
        await self._note("open", super().open_update(url, **bound))

    async def close_update(self, url: str, **bound: Any) -> None:
        await self._note("close", super().close_update(url, **bound))

    async def set_version(self, url: str, version: int, **bound: Any) -> None:
        await self._note("version", super().set_version(url, version, **bound))

    async def checksums(self, url: str, **bound: Any) -> Any:
        return await self._note("checksums", super().checksums(url, **bound))


class Driver:
    """Publishes by one transport after the other, to one server, and writes down what each publication took."""

    def __init__(self, trainer: Trainer, task: Task, control: TimedControl) -> None:
        self._trainer, self._task, self._control = trainer, task, control
        shape = trainer.rank.shape
        self._layout = EngineLayout(shape, 1, cpu=True)
        self._proof = Proof(self._layout, shape.vocab_size, TOLERANCE[task.dtype])
        self._version = 0

    def _transport(self, kind: str, delta: bool) -> Transport:
        common = {"bucket_mb": self._task.bucket_mb, "delta": delta, "timeout_s": TIMEOUT_S}
        if kind == "broadcast":
            return BroadcastTransport(**common)
        if kind == "colocated":
            return ColocatedTransport(**common)
        return DiskTransport(directory=self._task.directory, keep=1, **common)

    async def full_and_delta(self, kind: str) -> list[Row]:
        """A full publication; then one from a transport that sends deltas: full, as its first is, and a delta."""
        plain, first, delta = "full", "full, before deltas", "delta"
        rows = []
        for deltas, names in ((False, [plain]), (True, [first, delta])):
            self._trainer.everywhere("use", self._transport(kind, deltas))
            fleet = Fleet(patience_s=TIMEOUT_S)
            fleet.join("server", self._task.url)
            publisher = WeightPublisher(
                fleet,
                self._control,
                self._trainer,
                self._proof,
                api_key=self._task.key,
                timeout_s=TIMEOUT_S,
                session=kind != "disk",
            )
            for name in names:
                self._trainer.everywhere("change", self._task.changed)
                rows.append({"way": kind, "what": name, **await self._publish(publisher)})
            self._trainer.everywhere("leave")
        return rows

    async def ready_made(self, buckets: list[Bucket]) -> Row:
        """Buckets that lie ready, without digests: what the server's side of an update and the wire between them take."""
        sender = make_sender(self._transport("broadcast", False), torch.device("cpu"), HOST)
        control, url = self._control, self._task.url
        await asyncio.to_thread(sender.connect, [Server(url)], self._task.key)
        await control.pause(url)
        await control.open_update(url)
        sent = await asyncio.to_thread(sender.send, buckets, self._version)
        await control.close_update(url)
        await control.resume(url)
        await asyncio.to_thread(sender.close)
        cpu = control.cpu_at["close"] - control.cpu_at["open"]
        return {"bytes": sent.bytes, "update": control.seconds("open", "close"), "update, server cpu": cpu}

    async def _publish(self, publisher: WeightPublisher) -> Row:
        """Seconds by phase. Raises WeightSyncError when the server does not hold, or does not compute, what was sent."""
        self._version += 1
        cpu = cpu_of(self._task.server)
        found = {name.removeprefix("publish/"): value for name, value in (await publisher.publish(self._version)).items()}
        control, trainer = self._control, self._trainer
        sent = trainer.sent
        session = "write" not in sent.seconds
        closed = control.seconds("close") if session else 0.0
        return {
            "bytes": sent.bytes,
            "tensors": sent.tensors,
            **{name: found.get(name, sent.seconds.get(name, 0.0)) for name in PHASES},
            # from the first word about new weights to the last; files need no session
            "update": control.seconds("open", "close") if session else found["transfer"],
            "version": control.seconds("version"),
            "attestation": found["digest"] + found["attest"] - closed - control.seconds("version"),
            "checksums": control.seconds("checksums"),
            "checksums, server cpu": control.cpu_s["checksums"],
            "trainer cpu": sum(trainer.cpu_s),
            "update, server cpu": control.cpu_at["close"] - control.cpu_at["open"] if session else 0.0,
            "server cpu": cpu_of(self._task.server) - cpu,
            "memory": trainer.memory,
        }


class BareBroadcast:
    """Broadcasts of plain buffers from one process to another: what gloo can do here. Buffers are made once and used again."""

    def __init__(self, task: Task, rank: int, sizes: list[int]) -> None:
        bound = timedelta(seconds=TIMEOUT_S)
        self._store = dist.TCPStore(HOST, task.bare_port, 2, is_master=rank == 0, timeout=bound)
        self._group: Any = dist.ProcessGroupGloo(self._store, rank, 2, bound)  # torch's stubs leave its collectives out
        memory = torch.zeros(max(sizes), dtype=torch.uint8)
        self._buffers = [memory[:size] for size in sizes]

    def run(self) -> float:
        """Seconds from one barrier to the next."""
        self._group.barrier().wait()
        begin, cpu = time.monotonic(), time.process_time()
        for buffer in self._buffers:
            self._group.broadcast(buffer, 0).wait()
        self._group.barrier().wait()
        self.cpu_s = time.process_time() - cpu
        return time.monotonic() - begin


def measure(info: RankInfo, task: Task, sizes: list[int]) -> list[Row]:
    """Ranks 0 and 1 are the trainer, rank 2 receives bare broadcasts. Rank 0 returns a row for each publication."""
    if info.rank == TP:
        bare = BareBroadcast(task, 1, sizes)
        for _ in range(task.repeats + 1):
            bare.run()
        return []
    trainer_info = replace(info, world_size=TP)
    rank = TrainerRank(task.model, ParallelConfig(tp=TP), None, trainer_info, device="cpu", dtype=task.dtype, seed=1)
    trainer = Trainer(rank, task)
    rows: list[Row] = []
    if info.rank == 0:
        try:
            rows = asyncio.run(drive(trainer, task, sizes))
        finally:
            dist.broadcast_object_list(["stop", None], src=0)
    else:
        trainer.follow()
    rank.close()
    return rows


def ready_buckets(shape: ModelShape, dtype: torch.dtype, bucket_bytes: int) -> list[Bucket]:
    """Zeros under all names of the model, cut as a publication cuts them; all in the same memory."""
    cut = make_buckets(hf_tensors(shape), dtype.itemsize, bucket_bytes)
    memory = torch.zeros(max(sum(nbytes(each, dtype.itemsize) for each in bucket) for bucket in cut), dtype=torch.uint8)
    buckets = []
    for bucket in cut:
        sizes = [nbytes(each, dtype.itemsize) for each in bucket]
        parts = memory[: sum(sizes)].split(sizes)
        buckets.append([(each.name, part.view(dtype).view(each.shape)) for each, part in zip(bucket, parts, strict=True)])
    return buckets


async def drive(trainer: Trainer, task: Task, sizes: list[int]) -> list[Row]:
    """Every way in turn, `repeats` times after one round that only warms up."""
    bare = BareBroadcast(task, 0, sizes)
    rows: list[Row] = []
    async with Requests(task.key, TIMEOUT_S) as requests:
        driver = Driver(trainer, task, TimedControl(requests, task.server))
        ready = ready_buckets(trainer.rank.shape, getattr(torch, task.dtype), task.bucket_mb * 2**20)
        for repeat in range(task.repeats + 1):
            found = [{"way": "bare", "what": "full", "bytes": sum(sizes), "transfer": await asyncio.to_thread(bare.run)}]
            found[0]["trainer cpu"] = bare.cpu_s
            found.append({"way": "ready-made", "what": "full", **await driver.ready_made(ready)})
            for kind in task.ways:
                found += await driver.full_and_delta(kind)
            rows += [{"repeat": repeat, "load": os.getloadavg()[0], **row} for row in found if repeat]
    return rows
