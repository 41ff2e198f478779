"""What a trainer's ranks do in `test_weights`: publish Megatron's weights by every transport, and look at the servers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests
import torch
import torch.distributed as dist

from ctpo_megatron.config.cluster import BroadcastTransport, ColocatedTransport, DiskTransport, Transport
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.mcore.engine import MegatronEngine, RankInfo
from ctpo_megatron.weights.transport import Sent, Server

HOST = "127.0.0.1"
PROMPT = list(range(3, 40, 4))
BUCKET_BYTES = 60_000  # several buckets for each sender


@dataclass(frozen=True)
class Site:
    """The servers of a test, all with the same key."""

    servers: list[Server]
    key: str

    def post(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = requests.post(url + path, json=body or {}, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)
        assert answer.status_code == 200, f"{url}{path}: {answer.status_code} {answer.text}"
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def all(self, path: str, body: dict[str, Any] | None = None) -> list[Any]:
        return [self.post(server.url, path, body) for server in self.servers]

    def state(self) -> list[Any]:
        """Of every server: the checksum of each tensor on each rank, and what it generates greedily."""
        self.all("/flush_cache")
        greedy = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}}
        sums = [answer["ranks"] for answer in self.all("/weights_checker", {"action": "checksum"})]
        return [[rank["checksums"] for rank in ranks] for ranks in sums] + [
            a["output_ids"] for a in self.all("/generate", greedy)
        ]

    def load(self, directory: Path) -> list[Any]:
        """The state of servers that were freshly loaded from a model directory."""
        self.all("/update_weights_from_disk", {"model_path": str(directory), "flush_cache": False})
        return self.state()


def transports(root: Path) -> list[Transport]:
    """All of them, with deltas."""
    common = {"delta": True, "timeout_s": 60.0}
    return [BroadcastTransport(**common), ColocatedTransport(**common), DiskTransport(directory=str(root / "versions"), **common)]


def publish_everything(
    rank: RankInfo, path: Path, base: Path, site: Site, layouts: list[dict[str, int]], root: Path, ports: list[int]
) -> list[dict[str, Any]]:
    """Per layout and transport, on rank 0 what the servers held before and after; on every rank what it sent."""
    found = []
    for number, (layout, port) in enumerate(zip(layouts, ports, strict=True)):
        info = replace(rank, master_port=port)
        engine = MegatronEngine(str(path), ParallelConfig(**layout), None, info, device="cpu", dtype="float32", seed=1)
        exported = root / str(number)
        engine.save_hf(exported / "full")
        nudge(engine, 2.0)
        engine.save_hf(exported / "nudged")
        nudge(engine, 0.5)
        first = rank.rank == 0
        result: dict[str, Any] = {"fresh": [site.load(exported / name) for name in ("full", "nudged")] if first else None}
        for transport in transports(exported):
            result[transport.type] = publish_twice(engine, transport, site, base if first else None)
        found.append(result)
        engine.close()
    return found


def publish_twice(engine: MegatronEngine, transport: Transport, site: Site, base: Path | None) -> dict[str, Any]:
    """All weights, then a delta. Rank 0, which has `base`, plays the driver's part: another model first, sessions, the look."""
    from ctpo_megatron.weights.senders import make_sender
    from ctpo_megatron.weights.turns import open_turns

    turns = open_turns(engine.senders(), HOST, transport.timeout_s)
    sender = None if turns is None else make_sender(transport, torch.device("cpu"), HOST, turns)
    before = site.load(base) if base else None
    dist.barrier()
    if sender is not None:
        sender.connect(site.servers, site.key)
    found: dict[str, Any] = {"before": before, "sent": [], "held": []}
    for version, factor in ((1, 1.0), (2, 2.0)):
        nudge(engine, factor)
        if base and transport.type != "disk":
            site.all("/begin_weight_update")
        dist.barrier()
        buckets = engine.stream(BUCKET_BYTES)
        found["sent"].append(sender.send(buckets, version) if sender else Sent(version, tensors=sum(map(len, buckets))))
        dist.barrier()
        if base and transport.type != "disk":
            site.all("/end_weight_update")
        found["held"].append(site.state() if base else None)
        dist.barrier()
    nudge(engine, 0.5)
    if sender is not None:
        sender.close()
    return found


@torch.no_grad()
def nudge(engine: MegatronEngine, factor: float) -> None:
    """Scale three tensors, by a power of two and so without a trace when undone: one query projection, which the engine keeps in
    one parameter with key and value, and gate and up of one expert."""
    from ctpo_megatron.mcore.hf.load import RankPlace, keyed_tensors

    for model in engine.models:
        for key, parameter in keyed_tensors(model, engine.shape, RankPlace.current()):
            if key == "decoder.layers.1.self_attention.linear_qkv.weight":
                heads = engine.shape.num_heads // engine.shape.attention.num_kv_heads
                parameter[: heads * engine.shape.attention.head_dim] *= factor  # the queries of the rank's first group
            elif key == "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight":
                parameter *= factor
