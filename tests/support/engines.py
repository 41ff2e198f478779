"""What the tests of SGLang share: a running server, and transformers as the judge of its log-probs."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests
import torch
from safetensors.torch import load_file

from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.config.weights import BroadcastTransport
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.engine.processes import group_members
from ctpo_megatron.engine.server import SGLangServer, new_api_key
from ctpo_megatron.engine.server_args import server_args, server_env
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.ports import free_port
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.types import Generation, RoutingShape
from ctpo_megatron.weights.proof.canary import TOLERANCE
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from ctpo_megatron.weights.protocol import Server
from ctpo_megatron.weights.publisher import Proof
from ctpo_megatron.weights.transports.broadcast import BroadcastSender

HOST = "127.0.0.1"
START_S = 240.0
TIMEOUT_S = 240.0  # of whatever a server is asked, thousands of tokens among it, however busy the host is


@dataclass(frozen=True)
class RunningServer:
    """A healthy server and how to reach it."""

    server: SGLangServer
    api_key: str
    model: Path
    tp: int = 1
    routing: RoutingShape | None = None
    top_k: int = 0

    @property
    def url(self) -> str:
        return self.server.url

    def rss_bytes(self) -> int:
        """Resident memory of all its processes; shared pages count once per process."""
        return sum(psutil.Process(pid).memory_info().rss for pid in group_members(self.server.pid))

    def client(self, emit: Emit = discard) -> EngineClient:
        """Takes the server as it is: the version that it reports counts as proven. `emit`: told what becomes of the server."""
        key = {"Authorization": f"Bearer {self.api_key}"}
        version = requests.get(f"{self.url}/model_info", headers=key, timeout=TIMEOUT_S).json()["weight_version"]
        fleet = Fleet(patience_s=TIMEOUT_S, emit=emit)
        fleet.serve([fleet.join("server", self.url, self.tp)], int(version))
        record = {"routing": self.routing, "top_k": self.top_k}
        return EngineClient(fleet, self.api_key, request_timeout_s=TIMEOUT_S, **record)

    def proof(self) -> Proof:
        shape = read_hf_config(self.model)
        return Proof(EngineLayout(shape, self.tp, cpu=True), shape.vocab_size, TOLERANCE["float32"])

    def sender(self, *, digests: bool = True) -> BroadcastSender:
        """Connected; the caller closes it. Without `digests` it sends whatever it is given."""
        layout = self.proof().layout
        config, device = BroadcastTransport(timeout_s=TIMEOUT_S), torch.device("cpu")
        new_account = (lambda: ExpectedDigests(layout)) if digests else None
        sender = BroadcastSender(config, device=device, address=HOST, new_account=new_account)
        sender.connect([Server(self.url, self.tp)], self.api_key)
        return sender


def start_server(
    model: Path,
    log: Path,
    *,
    tp: int = 1,
    wait: bool = True,
    routing: RoutingShape | None = None,
    top_k: int = 0,
    key: str = "",
    port: int | None = None,
    forks: Path | None = None,
    quantised: bool = False,
    dtype: str = "",
) -> RunningServer:
    """Start a CPU server of `model` on `tp` ranks; with `wait` until it is healthy. It records what its client reads.

    `quantised`: weights in fp8, all else in `dtype`, bfloat16 by default. `forks`: where `forked_servers.forking` forks it; from
    nothing without.
    """
    engine, port, key = EngineConfig(tp=tp), port or free_port(HOST), key or new_api_key()
    recorded, dtype = routing is not None, dtype or ("bfloat16" if quantised else "float32")
    arguments = server_args(
        model, engine, device="cpu", dtype=dtype, port=port, seed=1, routed_experts=recorded, quantised=quantised
    )
    env = server_env(engine, device="cpu")
    server = SGLangServer(arguments, url=f"http://{HOST}:{port}", api_key=key, log=log, env=env, nursery=forks)
    if wait:
        server.wait_healthy(START_S)
    return RunningServer(server, key, model, tp, routing, top_k)


def endless(model: Path) -> Path:
    """Take the end-of-text token from the model's configuration, so that a generation ends by its length alone."""
    for file in (model / "config.json", model / "generation_config.json"):
        if file.exists():
            settings = json.loads(file.read_text())
            settings["eos_token_id"] = None
            file.write_text(json.dumps(settings))
    return model


async def in_flight(url: str, api_key: str, *, running: int, tokens: int = 20) -> None:
    """Until the server itself says that so many requests run at once, and have sampled about so many tokens each."""
    headers, deadline = {"Authorization": f"Bearer {api_key}"}, time.monotonic() + TIMEOUT_S
    while True:
        answer = await asyncio.to_thread(requests.get, f"{url}/v1/loads", headers=headers, timeout=TIMEOUT_S)
        (load,) = answer.json()["loads"]
        if load["num_running_reqs"] >= running and load["num_used_tokens"] >= running * tokens:
            return
        assert time.monotonic() < deadline, f"{running} requests were never in flight together: {load}"
        await asyncio.sleep(0.01)


def session(server: RunningServer, call: str) -> None:
    """`begin` or `end` an update session."""
    key = {"Authorization": f"Bearer {server.api_key}"}
    requests.post(f"{server.url}/{call}_weight_update", json={}, headers=key, timeout=TIMEOUT_S)


def load_reference(directory: Path) -> torch.nn.Module:
    """The same weights in transformers, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def checkpoint_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Its weights as they are named in files; transformers keeps the experts of a layer together in memory."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return list(load_file(Path(directory) / "model.safetensors").items())


def reference_logprobs(model: torch.nn.Module, prompt: list[int], generation: Generation, temperature: float) -> list[float]:
    """Log-prob of every sampled token by one transformers forward over prompt and response."""
    ids = torch.tensor([prompt + generation.token_ids])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids).logits[0].float() / temperature, -1)
    first = len(prompt) - 1
    return logp[first:-1].gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).tolist()
