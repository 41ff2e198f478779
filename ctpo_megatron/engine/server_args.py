"""What one SGLang server is started with: its arguments, and the variables of its environment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.config.rollout import CPU_KV_TOKENS, EngineConfig
from ctpo_megatron.environment import environment_of
from ctpo_megatron.models.quantised import server_config
from ctpo_megatron.models.threads import useful_threads

_CPU_ARGUMENTS = (
    *("--attention-backend", "torch_batched", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    "--disable-overlap-schedule",
    "--sleep-on-idle",  # schedulers that have nothing to do would otherwise poll, on cores that the trainer needs
)


@dataclass(frozen=True, slots=True)
class Part:
    """The processes of a server on one of its nodes. The first one answers requests; all meet at `head`, HOST:PORT there."""

    rank: int = 0
    head: str = ""


def server_args(
    model_path: str | Path,
    engine: EngineConfig,
    *,
    device: str,
    dtype: str,
    port: int,
    seed: int,
    host: str = "127.0.0.1",
    routed_experts: bool = False,
    shared_expert: bool = False,
    memory_saver: bool = False,
    quantised: bool = False,
    part: Part = Part(),
) -> list[str]:
    """Arguments of one server, as `sglang.launch_server` takes them. `engine.extra_args` come last and so win.

    `routed_experts`: requests may ask for the experts that each token went to. SGLang refuses to start a dense model with it.
    `shared_expert`: the model has one. On GPUs SGLang would otherwise lay it among the routed ones, where published weights have
    no tensor of that shape.
    `memory_saver`: it can give back its GPUs' memory; on a CPU it always can. `part`: of a server on `engine.nodes` nodes.
    `quantised`: it keeps weights in fp8 blocks. The model's files have none, so it starts with random ones and serves no request
    before a publication.
    The weights it loads are version 0. It speaks token ids only, so it needs no tokenizer; and no grammar is ever asked for.
    """
    arguments = ["--model-path", str(model_path), "--host", host, "--port", str(port)]
    arguments += ["--device", device, "--dtype", dtype, "--tp-size", str(engine.tp), "--random-seed", str(seed)]
    arguments += ["--weight-version", "0", "--skip-tokenizer-init", "--grammar-backend", "none", "--skip-server-warmup"]
    arguments += ["--log-level-http", "warning"]  # not a line per request
    arguments += ["--sampling-defaults", "openai"]  # not the model's generation_config.json, whatever the endpoint
    if device == "cpu":
        arguments += _CPU_ARGUMENTS
    if engine.nodes > 1:
        arguments += ["--nnodes", str(engine.nodes), "--node-rank", str(part.rank), "--dist-init-addr", part.head]
    if routed_experts:
        arguments += ["--enable-return-routed-experts"]
    if shared_expert and device != "cpu":  # on a CPU SGLang never joins them
        arguments += ["--disable-shared-experts-fusion"]
    if memory_saver:
        arguments += ["--enable-memory-saver"]
    if quantised:
        arguments += ["--load-format", "dummy", "--json-model-override-args", json.dumps(server_config())]
    kv_tokens = engine.max_total_tokens or (CPU_KV_TOKENS if device == "cpu" else None)
    if kv_tokens is not None:
        arguments += ["--max-total-tokens", str(kv_tokens)]
    return [*arguments, *engine.extra_args]


def server_env(
    engine: EngineConfig, *, device: str, gpus: Sequence[str] = (), alone: bool = False, hidden_size: int | None = None
) -> dict[str, str]:
    """Variables that SGLang, CUDA and OpenMP read and have no argument for; to be added to the parent's.

    `gpus` are the trainer's GPUs that the server sees, by CUDA's names; it uses the first ones. Empty: it has its own.
    `alone`: nothing else of the run computes while servers generate, see `RunConfig.servers_alone`.
    `hidden_size`: of the model, see `models.threads`; None: not known.
    """
    env = environment_of("server", device, os.environ, engine_args=engine.extra_args)
    if gpus:  # the check would refuse them: a stage of the trainer's pipeline may need more than another one
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false"}
    return env | _shares_of_cores(engine, alone, hidden_size) if device == "cpu" else env


def _shares_of_cores(engine: EngineConfig, alone: bool, hidden_size: int | None) -> dict[str, str]:
    """The threads of a server on CPUs, and the cores of each of its ranks.

    The ranks of all servers share the host: all its cores where they are `alone`, otherwise half, as the trainer computes too.
    """
    cores = sorted(os.sched_getaffinity(0))
    ranks = engine.tp_per_node * engine.servers  # at most so many are on one host
    share = len(cores) // ranks // (1 if alone else 2)
    env = {"OMP_NUM_THREADS": str(useful_threads(share, hidden_size))}
    if engine.tp > 1:  # without it SGLang wants one NUMA node per rank
        here = engine.tp_per_node
        share = max(1, len(cores) // here)
        shares = [cores[rank * share : (rank + 1) * share] or [cores[rank % len(cores)]] for rank in range(here)]
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, each)) for each in shares * engine.nodes)
    return env
