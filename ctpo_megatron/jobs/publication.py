"""Trainer and servers of a run joined for the publication of weights."""

from __future__ import annotations

from collections.abc import Sequence

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Prompt
from ctpo_megatron.weights.proof.canary import canary_tolerance
from ctpo_megatron.weights.publisher import Proof, WeightPublisher

CANARY_PROMPTS = 256  # of the run's own that canaries are made of


def canary_texts(prompts: Sequence[Prompt], chat: ChatTokenizer) -> list[list[int]]:
    """Token ids of some of the run's prompts, spread over the file."""
    return [chat.prompt_ids(prompt.messages) for prompt in prompts[:: -(-len(prompts) // CANARY_PROMPTS) or 1]]


def make_publisher(runtime: Runtime, client: EngineClient, texts: Sequence[Sequence[int]]) -> WeightPublisher:
    """Brings the weights of the runtime's trainer to its servers. `texts`: token ids that canaries are made of."""
    config = runtime.config
    return WeightPublisher(
        runtime.fleet,
        client.control,
        runtime.trainer,
        make_proof(config, runtime.shape, texts),
        api_key=runtime.api_key,
        timeout_s=config.weights.timeout_s,
        session=config.weights.needs_session,
        release=config.weights.servers_sleep,
        stages=runtime.stages,
    )


def make_proof(config: RunConfig, shape: ModelShape, texts: Sequence[Sequence[int]] = ()) -> Proof:
    """What the servers have to show. `cluster.device` is resolved. Raises ConfigError where they cannot hold the model."""
    device = config.cluster.device
    quantised = config.weights.quantization is not None
    layout = EngineLayout(shape, config.rollout.engine.tp, cpu=device == "cpu", quantised=quantised)
    routing = shape.routing if config.moe.routing_replay else None
    dtype, mixture = config.model.dtype_on(device), shape.num_experts > 0
    default = canary_tolerance(dtype, mixture=mixture, replayed=routing is not None, quantised=quantised)
    return Proof(layout, shape.vocab_size, config.attest.canary_tolerance or default, texts, routing)
