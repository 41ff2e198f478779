"""Speeds of servers and trainer on GPUs, computed from the plan: what is multiplied, read and sent, at shares of the peaks.

Computed, not measured. A decoding step reads all weights once and each request's cache. Training takes 6 operations for each
active parameter and token, 8 where layers are computed again, and 2 more for the old policy's log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.train import TrainConfig
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.flops import attention_weight
from ctpo_megatron.planning.parameters import active_parameters, model_parameters
from ctpo_megatron.planning.plan import Plan
from ctpo_megatron.planning.run import PlannedRun
from ctpo_megatron.planning.servers import server_weights
from ctpo_megatron.simulation.speeds import ServerSpeed, Speeds, TrainerSpeed

LAUNCH_S = 2e-3  # ours, an estimate: of a decoding step besides reading and multiplying
TOOL_S = 0.3  # ours, an estimate: of a call of the Python tool
START_S = 120.0  # ours, an estimate: until a server is up again
PAUSE_S = 1.0  # ours, an estimate: of a publication besides sending


@dataclass(frozen=True, slots=True)
class Peaks:
    """A GPU and what of it is reached. `teraflops`: dense, in the run's format; `terabytes_s`: of its memory; `gigabytes_s`: sent
    by one sender during a publication."""

    teraflops: float = 989.0
    terabytes_s: float = 3.35
    gigabytes_s: float = 20.0
    trained: float = 0.4  # share of teraflops that training reaches
    decoded: float = 0.6  # share of the memory's speed that decoding reaches
    prefilled: float = 0.5  # share of teraflops that reading prompts reaches


def roofline(run: PlannedRun, shape: ModelShape, plan: Plan, peaks: Peaks) -> Speeds:
    """Returns the speeds of `run`, planned as `plan`, on such GPUs."""
    whole = server_weights(shape, 1, run.element_bytes, quantised=run.weights.quantization is not None)
    send_s = 0.0 if run.topology.shares_gpus else whole / (peaks.gigabytes_s * 1e9)
    return Speeds(
        server=_server(run, shape, plan, peaks),
        trainer=_trainer(run.train, run, shape, peaks),
        publish_s=send_s + PAUSE_S,
        paused_s=send_s + PAUSE_S,
        tool_s=0.0 if run.rollout.tool is None else TOOL_S,
        start_s=START_S,
        source="computed from a roofline",
    )


def _server(run: PlannedRun, shape: ModelShape, plan: Plan, peaks: Peaks) -> ServerSpeed:
    read, flops = peaks.decoded * peaks.terabytes_s * 1e12, peaks.teraflops * 1e12
    active, gpus = active_parameters(shape), plan.servers.gpus_each
    return ServerSpeed(
        step_s=LAUNCH_S + plan.servers.weights / read,
        token_s=plan.servers.bytes_per_token / read,
        compute_s=2 * active / (gpus * flops * peaks.prefilled),
        prefill_s=LAUNCH_S,
        prefill_token_s=2 * active / (gpus * flops * peaks.prefilled),
        cache_tokens=max(plan.servers.cache_tokens, plan.servers.longest),
    )


def _trainer(train: TrainConfig, run: PlannedRun, shape: ModelShape, peaks: Peaks) -> TrainerSpeed:
    """Of one data-parallel replica: all of its GPUs work on each of its tokens."""
    gpus, passes = run.parallel.world_size / run.parallel.dp, 8 if train.recompute == "full" else 6
    # of the old policy: the first optimizer step needs none, unless a critic's values make its advantages
    forward = 2 * (1.0 if run.has_critic else 1 - 1 / train.optimizer_steps)
    work = passes + forward + 2 * (run.has_reference + run.copied_teachers)
    each = work * active_parameters(shape) / (gpus * peaks.teraflops * 1e12 * peaks.trained)
    updated = model_parameters(shape).total / run.parallel.world_size * 28 / (peaks.decoded * peaks.terabytes_s * 1e12)
    return TrainerSpeed(token_s=each, attention=attention_weight(shape), optimizer_s=updated + 0.2)
