"""Trainer and servers of a run joined for the publication of weights."""

from __future__ import annotations

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.weights.proof.canary import TOLERANCE
from ctpo_megatron.weights.publisher import Proof, WeightPublisher


def make_publisher(runtime: Runtime, client: EngineClient) -> WeightPublisher:
    """Brings the weights of the runtime's trainer to its servers."""
    config = runtime.config
    return WeightPublisher(
        runtime.fleet,
        client.control,
        runtime.trainer,
        make_proof(config, runtime.shape),
        api_key=runtime.api_key,
        timeout_s=config.weights.timeout_s,
        session=config.weights.needs_session,
        release=config.weights.servers_sleep,
    )


def make_proof(config: RunConfig, shape: ModelShape) -> Proof:
    """What the servers have to show. `cluster.device` is resolved. Raises ConfigError where they cannot hold the model."""
    device = config.cluster.device
    layout = EngineLayout(shape, config.rollout.engine.tp, cpu=device == "cpu")
    return Proof(layout, shape.vocab_size, config.attest.canary_tolerance or TOLERANCE[config.model.dtype_on(device)])
