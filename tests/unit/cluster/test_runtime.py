"""What a runtime knows before it starts any process. The integration tests run real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.cluster.trainer.actor import TrainerActor
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.fleet import State
from ctpo_megatron.jobs.topology import topology_of
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.record.events import Event, ServerLost, ServerSuspended
from ctpo_megatron.types import RoutingShape

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
SIZES |= {"vocab_size": 299, "max_position_embeddings": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
DENSE, MIXTURE = parse_config({"model_type": "qwen3"} | SIZES), parse_config({"model_type": "qwen3_moe"} | SIZES | EXPERTS)


def config(*, replay: bool = False) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "r",
            "run_dir": "r",
            "model": {"path": "m"},
            "data": {"train": "d"},
            "moe": {"routing_replay": replay},
            "rollout": {"engine": {"restarts": 3}},
            "cluster": {"device": "cpu"},
        }
    )


def test_a_run_without_a_trainer_says_so(tmp_path: Path) -> None:
    runtime = Runtime(config(), DENSE, topology_of(config(), trainer=False), tmp_path)
    with pytest.raises(RuntimeError, match="this run has no trainer"):
        _ = runtime.trainer


def test_chosen_experts_are_recorded_where_they_are_replayed(tmp_path: Path) -> None:
    def recorded(shape: ModelShape, *, replay: bool) -> RoutingShape | None:
        run = config(replay=replay)
        return Runtime(run, shape, topology_of(run), tmp_path).routing

    assert MIXTURE.routing is not None
    assert recorded(MIXTURE, replay=True) == MIXTURE.routing
    assert [recorded(MIXTURE, replay=False), recorded(DENSE, replay=True), recorded(DENSE, replay=False)] == [None] * 3


def test_servers_know_what_their_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(shape: ModelShape) -> tuple[bool, bool]:
        runtime = Runtime(config(replay=True), shape, topology_of(config()), tmp_path)
        monkeypatch.setattr("ctpo_megatron.cluster.runtime.EngineGroup", lambda *_, **model: model)
        given: dict[str, Any] = runtime._engine_group([])  # type: ignore[assignment]
        return given["routed_experts"], given["shared_expert"]

    shared = parse_config({"model_type": "deepseek_v3"} | SIZES | LATENT)
    assert told(shared) == (True, True)
    assert told(MIXTURE) == (True, False)
    assert told(DENSE) == (False, False)


def test_memory_for_servers_is_given_back_with_what_they_have_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps a bucket that was handed over until it has looked whether its reader is done; then the cache can be emptied."""
    import torch

    def calls(*, cuda: bool, sleeping: bool) -> list[str]:
        done: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: done.append("ipc_collect"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
        actor = SimpleNamespace(config=SimpleNamespace(weights=SimpleNamespace(servers_sleep=sleeping)))
        TrainerActor._free_memory(actor)  # type: ignore[arg-type]
        return done

    assert calls(cuda=True, sleeping=True) == ["ipc_collect", "empty_cache"]
    assert calls(cuda=False, sleeping=True) == ["empty_cache"]
    assert calls(cuda=True, sleeping=False) == []


@pytest.mark.parametrize(
    ("trainer", "after", "event"),
    [
        (True, State.SUSPENDED, ServerSuspended("server 0", "hangs")),
        (False, State.STARTING, ServerLost("server 0", "hangs\n(starting it again, 1 of 3)", again=True)),
    ],
)
def test_what_becomes_of_servers_is_emitted(tmp_path: Path, trainer: bool, after: State, event: Event) -> None:
    """With a trainer a failed server waits for the next publication; without one it is started again."""
    events: list[Event] = []
    run = config()
    fleet = Runtime(run, DENSE, topology_of(run, trainer=trainer), tmp_path, emit=events.append).fleet
    member = fleet.join("server 0", "http://a")
    fleet.suspend(member, "hangs")
    assert (member.state, events) == (after, [event])
