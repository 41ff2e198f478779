"""Arguments and environment of an SGLang server: pure functions of the configuration."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.engine.server import new_api_key
from ctpo_megatron.engine.server_args import CPU_KV_TOKENS, Part, server_args, server_env


def arguments(engine: EngineConfig, device: str) -> list[str]:
    return server_args("/models/m", engine, device=device, dtype="float32", port=20001, seed=3)


def value(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


def test_cpu() -> None:
    args = arguments(EngineConfig(tp=2), "cpu")
    assert value(args, "--host") == "127.0.0.1"
    assert value(args, "--tp-size") == "2"
    assert value(args, "--weight-version") == "0"
    assert value(args, "--max-total-tokens") == str(CPU_KV_TOKENS)
    assert "--disable-overlap-schedule" in args
    assert "--skip-tokenizer-init" in args


def test_gpu_gets_no_cpu_flags() -> None:
    args = arguments(EngineConfig(), "cuda")
    assert value(args, "--device") == "cuda"
    for flag in ("--attention-backend", "--sampling-backend", "--disable-overlap-schedule", "--max-total-tokens"):
        assert flag not in args
    assert "--enable-memory-saver" not in args
    env = server_env(EngineConfig(tp=4), device="cuda")
    assert not {"OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "SGLANG_CPU_OMP_THREADS_BIND", "CUDA_VISIBLE_DEVICES"} & env.keys()


def test_a_server_on_the_trainers_gpus() -> None:
    """It can give back memory, and sees the GPUs it is given, in that order."""
    args = server_args("/models/m", EngineConfig(), device="cuda", dtype="bfloat16", port=20001, seed=3, memory_saver=True)
    assert "--enable-memory-saver" in args
    assert server_env(EngineConfig(), device="cuda", gpus=("3", "1"))["CUDA_VISIBLE_DEVICES"] == "3,1"


def test_weights_in_fp8() -> None:
    """They come with the first publication: the model's files have none, and its config.json does not say so."""
    args = server_args("/models/m", EngineConfig(), device="cuda", dtype="bfloat16", port=20001, seed=3, quantised=True)
    assert value(args, "--load-format") == "dummy"
    (section,) = json.loads(value(args, "--json-model-override-args")).values()
    assert (section["quant_method"], section["weight_block_size"]) == ("fp8", [128, 128])
    assert "--json-model-override-args" not in arguments(EngineConfig(), "cuda")


def test_a_shared_expert_stays_apart_on_gpus() -> None:
    """SGLang joins it with the routed ones on CUDA of its own accord, where a published tensor of it finds no place."""

    def flags(device: str, **model: bool) -> list[str]:
        return server_args("/models/m", EngineConfig(), device=device, dtype="bfloat16", port=20001, seed=3, **model)

    flag = "--disable-shared-experts-fusion"
    assert flag in flags("cuda", shared_expert=True)
    assert flag not in flags("cuda", routed_experts=True)
    assert flag not in flags("cpu", shared_expert=True)
    source = Path(find_spec("sglang").origin).parent / "srt" / "arg_groups" / "field_order.py"
    assert '"disable_shared_experts_fusion"' in source.read_text()


def test_a_part_of_a_server() -> None:
    """All parts are told how many they are and where they meet; on CPUs each rank has its share of its own node's cores."""
    engine = EngineConfig(tp=4, nodes=2)
    args = server_args("/models/m", engine, device="cpu", dtype="float32", port=20001, seed=3, part=Part(1, "10.0.0.1:5000"))
    assert (value(args, "--tp-size"), value(args, "--nnodes"), value(args, "--node-rank")) == ("4", "2", "1")
    assert value(args, "--dist-init-addr") == "10.0.0.1:5000"
    assert "--nnodes" not in arguments(EngineConfig(tp=4), "cpu")


def test_user_arguments_come_last() -> None:
    args = arguments(EngineConfig(max_total_tokens=500, extra_args=("--max-total-tokens", "900")), "cpu")
    assert args[-2:] == ["--max-total-tokens", "900"]
    assert value(args, "--max-total-tokens") == "500"


@pytest.mark.parametrize(
    ("cores", "engine", "threads", "binding"),
    [
        (2, EngineConfig(), "1", None),
        (16, EngineConfig(), "8", None),
        (16, EngineConfig(servers=2), "4", None),
        (2, EngineConfig(tp=2), "1", "0|1"),
        (4, EngineConfig(tp=2), "1", "0,1|2,3"),
        (8, EngineConfig(tp=4, nodes=2), "2", "0,1,2,3|4,5,6,7|0,1,2,3|4,5,6,7"),
        (1, EngineConfig(tp=2), "1", "0|0"),
    ],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, cores: int, engine: EngineConfig, threads: str, binding: str | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    env = server_env(engine, device="cpu")
    assert env["OMP_NUM_THREADS"] == threads
    assert env.get("SGLANG_CPU_OMP_THREADS_BIND") == binding


@pytest.mark.parametrize(
    ("cores", "engine", "threads"),
    [
        (1, EngineConfig(), "1"),
        (2, EngineConfig(), "2"),
        (16, EngineConfig(servers=2), "8"),
        (16, EngineConfig(servers=2, tp=2), "4"),
        (16, EngineConfig(tp=4, nodes=2), "8"),
        (2, EngineConfig(servers=4), "1"),
    ],
)
def test_servers_that_are_alone_have_all_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, engine: EngineConfig, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    assert server_env(engine, device="cpu", alone=True)["OMP_NUM_THREADS"] == threads
    assert server_env(engine, device="cpu", alone=True, hidden_size=128)["OMP_NUM_THREADS"] == "1"


def test_keys_differ() -> None:
    assert new_api_key() != new_api_key()
    assert len(new_api_key()) >= 32
