"""What a trainer's ranks do in `test_weights`: publish Megatron's weights by every transport, and look at the servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests
import torch
import torch.distributed as dist

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport, DiskTransport, Transport
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.weights.protocol import Sent, Server

HOST = "127.0.0.1"
PROMPTS = (list(range(3, 40, 4)), [5, 250, 17] * 9)
BUCKET_BYTES = 60_000  # several buckets for each sender
GATE_UP = ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight")
NUDGED = ("embedding.word_embeddings.weight", "output_layer.weight", *GATE_UP)


@dataclass(frozen=True)
class State:
    """What the servers of a site hold and say; two are equal when every bit is."""

    digests: list[list[dict[str, str]]]  # per server and rank, of each tensor
    greedy: list[list[tuple[list[int], list[float]]]]  # per prompt and server: tokens and their log-probs

    def differences(self, other: State) -> list[str]:
        """Names of the tensors whose bits differ anywhere; and `greedy` where another word, or log-prob, is said."""
        mine, yours = ([rank for server in state.digests for rank in server] for state in (self, other))
        pairs = zip(mine, yours, strict=True)
        names = {name for ours, theirs in pairs for name in ours | theirs if ours.get(name) != theirs.get(name)}
        return sorted(names) + ["greedy"] * (self.greedy != other.greedy)


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
        with ThreadPoolExecutor(len(self.servers)) as threads:
            return list(threads.map(lambda server: self.post(server.url, path, body), self.servers))

    def state(self) -> State:
        """What they hold and say now."""
        self.all("/flush_cache?timeout=30")  # once idle: a health check may still be under way
        sums = [answer["ranks"] for answer in self.all("/weights_checker", {"action": "checksum"})]
        digests = [[rank["checksums"] for rank in ranks] for ranks in sums]
        return State(digests, [self._greedy(prompt) for prompt in PROMPTS])

    def _greedy(self, prompt: list[int]) -> list[tuple[list[int], list[float]]]:
        """Of every server: the tokens that follow, and their log-probs."""
        sampling = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        answers = self.all("/generate", {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True})
        return [(each["output_ids"], [entry[0] for entry in each["meta_info"]["output_token_logprobs"]]) for each in answers]

    def load(self, directory: Path) -> State:
        """The state after loading a model directory."""
        self.all("/update_weights_from_disk", {"model_path": str(directory), "flush_cache": False})
        return self.state()


@dataclass(frozen=True)
class Case:
    """A trainer of a model, and the servers that it publishes to."""

    model: Path
    base: Path  # other weights of the same model
    site: Site
    layout: dict[str, int]
    kinds: tuple[str, ...] = ("broadcast",)  # of transports

    def __str__(self) -> str:
        return f"{self.model.name} from {self.layout}"

    def transports(self, root: Path) -> list[Transport]:
        """Those wanted, with deltas."""
        common = {"delta": True, "timeout_s": 60.0}
        disk = DiskTransport(directory=str(root / "versions"), **common)
        return [each for each in (BroadcastTransport(**common), ColocatedTransport(**common), disk) if each.type in self.kinds]


def publish_everything(rank: RankInfo, cases: list[Case], root: Path, ports: list[int]) -> list[dict[str, Any]]:
    """Per case and transport, on rank 0 what the servers held before and after; on every rank what it sent.

    The weights, and those of the delta, are exported to `root`/NUMBER/full and nudged.
    """
    found = []
    for number, (case, port) in enumerate(zip(cases, ports, strict=True)):
        info, parallel = replace(rank, master_port=port), ParallelConfig(**case.layout)
        engine = TrainerRank(str(case.model), parallel, None, info, device="cpu", dtype="float32", seed=1)
        exported = root / str(number)
        engine.save_hf(exported / "full")
        nudge(engine, 2.0)
        engine.save_hf(exported / "nudged")
        nudge(engine, 0.5)
        first = rank.rank == 0
        result: dict[str, Any] = {"loaded": [case.site.load(exported / name) for name in ("full", "nudged")] if first else None}
        for transport in case.transports(exported):
            result[transport.type] = publish_twice(engine, transport, case.site, case.base if first else None)
        found.append(result)
        engine.close()
    return found


def publish_twice(engine: TrainerRank, transport: Transport, site: Site, base: Path | None) -> dict[str, Any]:
    """All weights, then a delta. Rank 0, which has `base`, plays the driver's part: another model first, sessions, the look."""
    from ctpo_megatron.weights.transports.choose import make_sender
    from ctpo_megatron.weights.transports.order import open_order

    per_stage = transport.sends_per_stage
    turns = open_order(engine.senders(per_stage=per_stage), HOST, transport.timeout_s)
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
        buckets = engine.stream(BUCKET_BYTES, per_stage=per_stage)
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
def nudge(engine: TrainerRank, factor: float) -> None:
    """Scale some tensors, by a power of two and so without a trace when undone: both ends of the model, which may be one tensor;
    a query projection, which the engine keeps in one parameter with key and value; gate and up of a layer or of one expert."""
    from ctpo_megatron.mcore.groups import current_coords
    from ctpo_megatron.mcore.hf.load import keyed_tensors

    for model in engine.models:
        for key, parameter in keyed_tensors(model, engine.shape, current_coords()):
            if key in NUDGED:
                parameter *= factor
            elif key.startswith("decoder.layers.1.self_attention.linear_qkv."):
                heads = engine.shape.num_heads // engine.shape.attention.num_kv_heads
                parameter[: heads * engine.shape.attention.head_dim] *= factor  # the queries of the rank's first group
