"""GPU memory of one trainer rank, per pipeline stage, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.models.rules import stage_layers
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.activations import Kept, head_working, layer_kept, replay_bytes, value_working
from ctpo_megatron.planning.fp8 import keeps_attention_again, weight_copies
from ctpo_megatron.planning.parameters import Parameters, stage_adapters, stage_parameters
from ctpo_megatron.planning.run import FORMAT_BYTES, PlannedRun
from ctpo_megatron.planning.saving import Saving, plan_saving, rank_share
from ctpo_megatron.planning.work import FLOAT, Work

GIB = 2**30
# Ours, not measured: CUDA context, NCCL's buffers, workspaces of cuBLAS and TransformerEngine, the allocator's waste.
RESERVE = 6 * GIB
# Ours, not measured: CUDA context, workspaces and CUDA graphs of a server on the same GPU that has given back the rest. SGLang
# gives graphs back only with SGLANG_MEMORY_SAVER_CUDA_GRAPH=1, which changes its all-reduce as well.
ASLEEP = 4 * GIB
PINNED = 2  # times as much at most, as torch hands out pinned memory in powers of two (CachingHostAllocator)
OFFLOADED = 3 * FLOAT + PINNED * FLOAT  # of each number: itself and two moments, and its gradient, which is pinned
CONTEXT = GIB // 2  # ours, not measured: of a process that reads memory of a GPU which is not its own


@dataclass(frozen=True, slots=True)
class StageMemory:
    """One rank of a pipeline stage at its fullest moment."""

    weights: int
    fp8_copies: int  # of weights, for products in fp8
    gradients: int
    optimizer: int  # on the GPU
    activations: int  # of all micro-batches in flight
    working: int  # of the layer that is in its backward pass: what it recomputes, and gradients
    head: int
    micro_batches: int  # of one optimizer step, and the log-probs that are kept for all steps of a rollout batch
    replay: int  # of the same optimizer step
    contexts: int  # of servers that read buckets of weights from this GPU and are on another one
    publication: int  # a bucket of weights on its way to the servers
    reserve: int

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def resident(self) -> int:
        """Bytes that stay on the GPU while servers on it generate. Contexts come after SGLang has taken its share."""
        return self.weights + self.fp8_copies + self.gradients + self.optimizer + self.reserve


@dataclass(frozen=True, slots=True)
class Stage:
    """A pipeline stage's part of the model and what a rank of it needs."""

    layers: int
    parameters: Parameters
    in_flight: int  # model chunks whose activations are held at once; of one chunk per stage: micro-batches
    memory: StageMemory
    host_optimizer: int  # bytes of the offloaded optimizer in the host's memory, at most
    saving: Saving


def plan_stages(run: PlannedRun, shape: ModelShape, micro_batches: int) -> list[Stage]:
    """Every pipeline stage of `run`, whose layout must pass `check_layout`. `micro_batches`: those of one optimizer step."""
    parallel, element = run.parallel, run.element_bytes
    fp8, tokens = run.train.fp8, run.train.max_tokens_per_micro_batch
    work = Work(tokens, element, run.train.recompute, attention_again=keeps_attention_again(fp8))
    copies = [0] * parallel.pp if fp8 is None else weight_copies(shape, parallel, fp8)
    found = []
    held_parameters = stage_parameters(shape, parallel, value_head=run.has_critic)
    adapter = run.model.adapter
    # gradients, optimizer and checkpoints are of what is trained
    parameters = held_parameters if adapter is None else stage_adapters(shape, parallel, adapter)
    for number, chunks in enumerate(stage_layers(shape, parallel)):
        held = [[layer_kept(shape, layer, parallel, work, adapter) for layer in chunk] for chunk in chunks]
        flying = in_flight(number, parallel.pp, parallel.vpp, micro_batches)
        mixtures = sum(layer in shape.expert_layers for chunk in chunks for layer in chunk)
        state = optimizer_bytes(parameters[number], parallel, run.optimizer, element)
        offload = run.optimizer.cpu_offload
        memory = StageMemory(
            weights=(held_parameters[number].total + (parameters[number].total if adapter else 0)) * element,
            fp8_copies=copies[number],
            gradients=parameters[number].total * 4,
            optimizer=round(state * (1 - offload)),
            activations=_activations(held, work.recompute, flying),
            working=_working(held, work.recompute),
            head=_head(run, shape, work) if number == parallel.pp - 1 else 0,
            micro_batches=_streams(run, micro_batches),
            replay=replay_bytes(shape, mixtures, parallel.tp, work) * micro_batches if run.moe.routing_replay else 0,
            contexts=run.topology.ranks_beside * CONTEXT,
            publication=2 * run.weights.bucket_mb * 2**20,
            reserve=0 if run.on_cpu else RESERVE + (ASLEEP if run.weights.servers_sleep else 0),
        )
        on_host = round(rank_share(parameters[number], parallel) * OFFLOADED * offload)
        saving = plan_saving(parameters[number], parallel, element)
        found.append(Stage(sum(map(len, chunks)), held_parameters[number], flying, memory, on_host, saving))
    return found


def optimizer_bytes(parameters: Parameters, parallel: ParallelConfig, optimizer: OptimizerConfig, element: int) -> int:
    """Bytes of a rank's share of AdamW's state. All of it is there from the start, before servers look for free memory."""
    return rank_share(parameters, parallel) * state_bytes(optimizer, element)


def state_bytes(optimizer: OptimizerConfig, element: int) -> int:
    """Bytes per parameter: two moments, and a float32 copy of weights that are kept in 16 bits."""
    return FORMAT_BYTES[optimizer.exp_avg_dtype] + FORMAT_BYTES[optimizer.exp_avg_sq_dtype] + (4 if element == 2 else 0)


def in_flight(stage: int, pp: int, vpp: int, micro_batches: int) -> int:
    """Model chunks of pipeline stage `stage` whose activations are alive at once under 1F1B.

    One more than megatron's warm-up (pipeline_parallel.schedules.get_pp_rank_microbatches): pp - stage - 1 micro-batches, with
    interleaving 2 (pp - stage - 1) + (vpp - 1) pp chunks.
    """
    warm_up = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    return min(warm_up + 1, micro_batches * vpp)


def _head(run: PlannedRun, shape: ModelShape, work: Work) -> int:
    return head_working(shape, run.parallel.tp, work) + (value_working(shape, work) if run.has_critic else 0)


def _streams(run: PlannedRun, micro_batches: int) -> int:
    """A step's micro-batches, and one log-prob or two for every token of the rollout batch."""
    tokens = run.train.max_tokens_per_micro_batch * micro_batches
    return tokens * (run.token_bytes + run.kept_token_bytes * run.train.optimizer_steps)


def _activations(chunks: list[list[Kept]], recompute: str, flying: int) -> int:
    per_chunk = [sum(kept.input if recompute == "full" else kept.total for kept in chunk) for chunk in chunks]
    return flying * -(-sum(per_chunk) // len(per_chunk))


def _working(chunks: list[list[Kept]], recompute: str) -> int:
    """Gradients of the largest layer's activations, taken as large as these; when it is recomputed, these as well."""
    largest = max(kept.total for chunk in chunks for kept in chunk)
    return largest * (2 if recompute == "full" else 1)
