"""What the tests of SGLang share: a running server, and transformers as the judge of its log-probs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ctpo_megatron.cluster.server import SGLangServer, new_api_key, server_args, server_env
from ctpo_megatron.config.cluster import BroadcastTransport
from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.ports import free_port
from ctpo_megatron.rollout.client import EngineClient, Generation
from ctpo_megatron.weights.broadcast import BroadcastSender

HOST = "127.0.0.1"
START_S = 240.0
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RunningServer:
    """A healthy server and how to reach it."""

    server: SGLangServer
    api_key: str
    tp: int = 1

    @property
    def url(self) -> str:
        return self.server.url

    def client(self) -> EngineClient:
        return EngineClient([self.url], self.api_key, request_timeout_s=TIMEOUT_S)

    def sender(self) -> BroadcastSender:
        """Connected; the caller closes it."""
        sender = BroadcastSender(BroadcastTransport(timeout_s=TIMEOUT_S), device=torch.device("cpu"), address=HOST)
        sender.connect([self.url], self.api_key, self.tp)
        return sender


def start_server(model: Path, log: Path, *, tp: int = 1, wait: bool = True) -> RunningServer:
    """Start a CPU server of `model` on `tp` ranks; with `wait` until it is healthy."""
    engine, port, key = EngineConfig(tp=tp), free_port(HOST), new_api_key()
    arguments = server_args(model, engine, device="cpu", dtype="float32", port=port, seed=1)
    server = SGLangServer(arguments, url=f"http://{HOST}:{port}", api_key=key, log=log, env=server_env(engine, device="cpu"))
    if wait:
        server.wait_healthy(START_S)
    return RunningServer(server, key, tp)


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
