"""What the inference servers need: weights per GPU, room for keys and values, samples that fit at once."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.rollout import CPU_KV_TOKENS, EngineConfig
from ctpo_megatron.models.quantised import BLOCK
from ctpo_megatron.models.shape import HeadAttention, ModelShape
from ctpo_megatron.planning.memory import GIB
from ctpo_megatron.planning.parameters import model_parameters
from ctpo_megatron.planning.run import PlannedRun

FRACTION_FLAG = "--mem-fraction-static"
# SGLang 0.5.23 leaves this much of a GPU of more than 60 GiB free of weights and cache, and 1 GiB per 8 tensor-parallel ranks
# (its srt/arg_groups/memory_hook.py); cuda graphs for very large batches would take more.
SGLANG_RESERVE = 10 * GIB
# Ours, not measured: the most that one NCCL communicator with other nodes takes on each of its GPUs, for channels and peers.
COMMUNICATOR = GIB // 2


@dataclass(frozen=True, slots=True)
class Servers:
    """All servers are alike; bytes are per GPU."""

    servers: int
    gpus_each: int
    nodes_each: int
    weights: int
    budget: int  # for weights and cache together
    bytes_per_token: int  # of keys and values
    cache_tokens: int  # of one server
    longest: int  # tokens of a sample: prompt and response at their limits
    asked: int  # samples that one server is given at once: its share of rollout.concurrency
    communicators: int  # that each GPU shares with the trainer's senders, one for each of them
    spare: int  # what SGLang leaves free of weights and cache, for communicators, working memory and graphs

    @property
    def communicator_bytes(self) -> int:
        """An estimate of what the communicators with the senders take."""
        return self.communicators * COMMUNICATOR

    @property
    def samples(self) -> int:
        """Samples of full length that fit into one server's cache."""
        return self.cache_tokens // self.longest

    @property
    def missing(self) -> int:
        """Bytes per GPU that are lacking for weights and one sample of full length; 0: it fits."""
        return max(0, self.weights + self.longest * self.bytes_per_token - self.budget)


@dataclass(frozen=True, slots=True)
class PlannedTeacher:
    """A teacher whose servers the run starts. `shape`: None where `unplanned` says why its memory cannot be planned."""

    name: str
    section: str  # of its servers' settings
    engine: EngineConfig
    concurrency: int  # requests in flight
    shape: ModelShape | None
    quantised: bool = False  # its files are in fp8 blocks
    unplanned: str = ""


def plan_servers(run: PlannedRun, shape: ModelShape, gpu_bytes: int | None, taken: int = 0) -> Servers:
    """The servers of `run` on GPUs of `gpu_bytes`; None: on CPUs, where the cache is as large as it is asked to be.

    `taken`: what a trainer on the same GPU keeps while they generate; SGLang gives them the same share of what is left.
    """
    quantised = run.weights.quantization is not None
    communicators = run.parallel.pp if run.weights.sends_per_stage and gpu_bytes is not None else 0
    engine, asked = run.rollout.engine, run.rollout.concurrency
    return _plan(run, engine, shape, gpu_bytes, taken, quantised=quantised, asked=asked, communicators=communicators)


def plan_teacher(run: PlannedRun, teacher: PlannedTeacher, gpu_bytes: int | None) -> Servers | None:
    """Its servers, by the same arithmetic, on GPUs of their own; None where its shape is not known."""
    if teacher.shape is None:
        return None
    return _plan(run, teacher.engine, teacher.shape, gpu_bytes, 0, quantised=teacher.quantised, asked=teacher.concurrency)


def _plan(
    run: PlannedRun,
    engine: EngineConfig,
    shape: ModelShape,
    gpu_bytes: int | None,
    taken: int,
    *,
    quantised: bool,
    asked: int,
    communicators: int = 0,
) -> Servers:
    """Servers as `engine` says; `asked`: samples that all of them are given at once."""
    element = run.element_bytes
    weights = server_weights(shape, engine.tp, element, quantised=quantised)
    per_token = token_bytes(shape, engine.tp, element)
    if gpu_bytes is None:
        budget = weights + (engine.max_total_tokens or CPU_KV_TOKENS) * per_token
    else:
        budget = max(0, gpu_bytes - taken) * _budget(engine.extra_args, engine.tp, gpu_bytes) // gpu_bytes
    spare = 0 if gpu_bytes is None else max(0, gpu_bytes - taken - budget)
    tokens = max(0, budget - weights) // per_token
    if engine.max_total_tokens is not None:
        tokens = min(tokens, engine.max_total_tokens)
    return Servers(
        servers=engine.servers,
        gpus_each=engine.tp,
        nodes_each=engine.nodes,
        weights=weights,
        budget=budget,
        bytes_per_token=per_token,
        cache_tokens=tokens,
        longest=run.longest,
        asked=-(-asked // engine.servers),
        communicators=communicators,
        spare=spare,
    )


def token_bytes(shape: ModelShape, tp: int, element: int) -> int:
    """Keys and values of one token on one GPU. Heads are split; one latent per layer (MLA) is held by every GPU."""
    attention = shape.attention
    if isinstance(attention, HeadAttention):
        width = 2 * max(1, attention.num_kv_heads // tp) * attention.head_dim
    else:
        width = attention.kv_rank + attention.rope_dim
    return shape.num_layers * width * element


def server_weights(shape: ModelShape, tp: int, element: int, *, quantised: bool) -> int:
    """Bytes of weights on one GPU of a server of `tp`. `quantised`: all but embedding and output layer in fp8 blocks, with their
    scales; norms and routers are counted so too."""
    whole = server_parameters(shape, tp)
    if not quantised:
        return whole * element
    ends = -(-shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2) // tp)
    return ends * element + (whole - ends) + 4 * -(-(whole - ends) // BLOCK**2)


def server_parameters(shape: ModelShape, tp: int) -> int:
    """Parameters on one GPU of a server of `tp`: all matrices are split but MLA's down-projections.

    Norms and routers, below a thousandth of all, are counted as split; key-value heads are repeated where `tp` is more.
    """
    whole = model_parameters(shape).total
    attention, hidden = shape.attention, shape.hidden_size
    if isinstance(attention, HeadAttention):
        repeated = max(0, tp - attention.num_kv_heads) * 2 * attention.head_dim * hidden * shape.num_layers
        return -(-(whole + repeated) // tp)
    down = hidden * ((attention.q_rank or 0) + attention.kv_rank + attention.rope_dim) * shape.num_layers
    return -(-(whole - down) // tp) + down


def _budget(extra_args: tuple[str, ...], tp: int, gpu_bytes: int) -> int:
    for at, word in enumerate(extra_args):
        flag, _, value = word.partition("=")
        if flag == FRACTION_FLAG:
            return int(float(value or extra_args[at + 1]) * gpu_bytes)
    return gpu_bytes - SGLANG_RESERVE - tp * GIB // 8
