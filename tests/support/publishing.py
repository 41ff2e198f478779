"""A trainer in the test's own process that publishes to a running server, and what the server samples, held against it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.types import Generation
from ctpo_megatron.weights.protocol import Sent, Server
from ctpo_megatron.weights.publisher import WeightPublisher
from ctpo_megatron.weights.transports.broadcast import BroadcastSender
from tests.support.engines import TIMEOUT_S, RunningServer, checkpoint_tensors, load_reference, reference_logprobs

AGREEMENT = 1e-4  # largest difference of a token's log-prob between SGLang and transformers, float32
PROMPT = list(b"What is 12 * 12?")
END_OF_TURN = 257


class LocalTrainer:
    """A trainer of one process that holds the model to publish."""

    def __init__(self, sender: BroadcastSender, model: torch.nn.Module, *, bucket_size: int = 7) -> None:
        self._sender = sender
        self._model = model
        self._bucket_size = bucket_size

    async def connect(self, servers: list[Server], api_key: str) -> None:
        await asyncio.to_thread(self._sender.connect, servers, api_key)

    async def prepare(self, _version: int) -> None: ...

    async def publish(self, version: int) -> Sent:
        named = checkpoint_tensors(self._model)
        buckets = [named[at : at + self._bucket_size] for at in range(0, len(named), self._bucket_size)]
        return await asyncio.to_thread(self._sender.send, buckets, version)

    async def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        return reference_logprobs(self._model, token_ids[:1], Generation(token_ids[1:]), 1.0)


@asynccontextmanager
async def publishing(
    server: RunningServer, model: torch.nn.Module, emit: Emit = discard
) -> AsyncIterator[tuple[EngineClient, WeightPublisher]]:
    sender = await asyncio.to_thread(server.sender)
    try:
        async with server.client(emit) as client:
            trainer, key = LocalTrainer(sender, model), server.api_key
            yield client, WeightPublisher(client.fleet, client.control, trainer, server.proof(), api_key=key, timeout_s=TIMEOUT_S)
    finally:
        await asyncio.to_thread(sender.close)


def perturbed(directory: Path, seed: int) -> torch.nn.Module:
    """The model with every weight a little different."""
    model = load_reference(directory)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def serving(url: str) -> Fleet:
    fleet = Fleet(patience_s=1)
    fleet.serve([fleet.join("server", url)], 0)
    return fleet


async def sample(
    client: EngineClient, temperature: float, *, tokens: int = 48, session: int = 0, stop: tuple[int, ...] = (END_OF_TURN,)
) -> Generation:
    return await client.generate(
        PROMPT, max_new_tokens=tokens, temperature=temperature, stop_token_ids=list(stop), session=session
    )


def check_against(model: torch.nn.Module, generation: Generation, temperature: float) -> None:
    expected = reference_logprobs(model, PROMPT, generation, temperature)
    assert generation.rollout_logp == pytest.approx(expected, abs=AGREEMENT)
