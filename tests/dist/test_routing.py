"""Routing replay: the same numbers at every layout, those of the router's own choice, and of no other. megatron-core on gloo."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.batch import Replay
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.types import TrainSample
from tests.dist.test_engine import TEMPERATURE, exported, join, nll_step, start
from tests.support import faults
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
FAMILY, LAYERS, EXPERTS, TOP_K = "qwen3_moe", 4, 4, 2
ONE_RANK = {
    "own": ("own", "none"),  # the routers' own choice, replayed
    "unreplayed": (None, "none"),
    "other": ("other", "none"),  # half of the tokens go elsewhere, a quarter is unknown
    "recomputed": ("other", "full"),
    "shifted": ("other", "none"),  # with a fault
    "one_flipped": ("one_flipped", "none"),
}
TWO_RANKS = [
    ({"tp": 2}, "none"),
    ({"cp": 2, "ep": 2}, "none"),
    ({"pp": 2}, "full"),
    ({"pp": 2, "vpp": 2}, "full"),
    ({"dp": 2, "ep": 2}, "none"),
    ({"tp": 2}, "full"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(FAMILY), FAMILY, layers=LAYERS)


@pytest.fixture(scope="module")
def one_rank(model: Path) -> dict[str, Any]:
    return run_ranks(1, alone, model)[0]


def test_the_routers_own_choice_changes_nothing(one_rank: dict[str, Any]) -> None:
    same(one_rank["own"], one_rank["unreplayed"], "own routing")
    assert one_rank["own"]["steps"][0]["routing/changed"] == 0.0
    assert "routing/changed" not in one_rank["unreplayed"]["steps"][0]


def test_another_routing_is_followed(one_rank: dict[str, Any]) -> None:
    """One expert of one token: the log-probs from that token on change, in its sequence and nowhere else."""
    assert 0.2 < one_rank["other"]["steps"][0]["routing/changed"] < 0.8
    assert apart(one_rank["other"], one_rank["unreplayed"]) > 100 * TOLERANCE
    flipped, own = one_rank["one_flipped"]["logp"], one_rank["own"]["logp"]
    changed = np.abs(flipped[0] - own[0]) > TOLERANCE
    pack = micro_batches()[0]
    assert changed[FLIPPED]
    assert not changed[:FLIPPED].any()
    assert not changed[int(pack.sequences.cu_seqlens[2]) :].any()
    assert all(np.array_equal(a, b) for a, b in zip(flipped[1:], own[1:], strict=True))


def test_layers_that_are_computed_again_follow_the_same_routing(one_rank: dict[str, Any]) -> None:
    same(one_rank["recomputed"], one_rank["other"], "recompute")


def test_a_shifted_routing_is_caught(one_rank: dict[str, Any]) -> None:
    assert apart(one_rank["shifted"], one_rank["other"]) > 100 * TOLERANCE


def test_the_load_is_that_of_the_tokens(one_rank: dict[str, Any]) -> None:
    """Against a count of the routing that was replayed, for a routing in which every token is known."""
    packs = recorded_packs([torch.from_numpy(routing) for routing in one_rank["routing"]], "own")
    ids = torch.cat([pack.replay.routed_experts for pack in packs])
    for layer in range(LAYERS):
        load = torch.bincount(ids[:, layer].flatten().int(), minlength=EXPERTS).double()
        share = load / load.sum()
        found = one_rank["own"]["steps"][0]
        assert [found[f"moe/load/layer_{layer}/{expert}"] for expert in range(EXPERTS)] == pytest.approx(
            (share * EXPERTS).tolist()
        )
        assert found[f"moe/load_max_over_mean/layer_{layer}"] == pytest.approx(float(share.max() * EXPERTS))
        assert found[f"moe/load_entropy/layer_{layer}"] == pytest.approx(float(-(share * share.log()).sum() / np.log(EXPERTS)))


def test_gates_are_the_trainers_own_over_the_replayed_experts(one_rank: dict[str, Any]) -> None:
    for case, error in one_rank["gates"].items():
        assert error < 1e-6, case


def test_megatrons_own_replay_still_cannot_leave_tokens_to_the_router(one_rank: dict[str, Any]) -> None:
    """Should it learn to, `mcore.model.routing.Replay` may go."""
    assert one_rank["megatron_refuses"]


def test_ranks_without_samples_add_nothing(one_rank: dict[str, Any]) -> None:
    """A pack of nothing but padding, which some ranks get: no load, no loss, and no NaN from a mean over nothing."""
    whole, empty = one_rank["one pack"], one_rank["and an empty one"]
    assert {name: value for name, value in empty.items() if name.startswith("moe/")} == {
        name: value for name, value in whole.items() if name.startswith("moe/")
    }
    assert empty["loss"] == whole["loss"]
    assert empty["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.1), (
        "the balancing loss is halved, it is a mean over packs"
    )


def test_megatrons_own_mask_of_padding_still_fails(one_rank: dict[str, Any]) -> None:
    """Should it hold, `ReplayRouter._apply_expert_bias` may go."""
    assert one_rank["megatron_mask_fails"]


def test_two_ranks(model: Path, one_rank: dict[str, Any]) -> None:
    ports = [free_port() for _ in TWO_RANKS]
    answers = run_ranks(2, several, ports, model, one_rank["routing"])
    for i, (layout, recompute) in enumerate(TWO_RANKS):
        same(join([answer[i] for answer in answers]), one_rank["other"], f"{layout}, recompute {recompute}")


def same(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    assert apart(found, expected) < TOLERANCE, case
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        for name in ("loss", "grad_norm", *(name for name in theirs if name.startswith("moe/"))):
            assert ours[name] == pytest.approx(theirs[name], abs=TOLERANCE, rel=TOLERANCE), f"{case}: {name}"
    for name, value in expected["trained"].items():
        np.testing.assert_allclose(found["trained"][name], value, atol=TOLERANCE, rtol=0, err_msg=f"{case}: {name}")


def apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(found["logp"], expected["logp"], strict=True))


FLIPPED = 14  # the third token of the second sequence of the first pack


def recorded_packs(routing: list[torch.Tensor], kind: str | None) -> list[Any]:
    """The packs with a routing made from the routers' own."""
    if kind is None:
        return micro_batches()
    generator, packs = torch.Generator().manual_seed(3), []
    for number, (whole, own) in enumerate(zip(micro_batches(), routing, strict=True)):
        experts = own.clone()
        if kind == "other":
            elsewhere = torch.rand(own.shape, generator=generator).argsort(-1)[..., :TOP_K] + 1
            dice = torch.rand(len(own), generator=generator)
            experts = torch.where((dice < 0.5)[:, None, None], elsewhere.to(own.dtype), own)
            experts[dice > 0.75] = -1
        if kind == "one_flipped" and number == 0:
            chosen = set(own[FLIPPED, 0].tolist())
            experts[FLIPPED, 0, 0] = min(set(range(EXPERTS)) - chosen)
        packs.append(replace(whole, replay=Replay(experts)))
    return packs


# ---- what runs in the ranks


def alone(rank: RankInfo, path: Path) -> dict[str, Any]:
    routing = own_routing(rank, path)
    found: dict[str, Any] = {"routing": [ids.numpy() for ids in routing]}
    for case, (kind, recompute) in ONE_RANK.items():
        with faults.routing_shifted() if case == "shifted" else nullcontext():
            found[case] = exercise(rank, path, {}, recorded_packs(routing, kind), recompute)
    found |= with_empty_pack(rank, path)
    found["megatron_mask_fails"] = megatron_mask_fails()
    found["gates"] = gate_errors()
    found["megatron_refuses"] = megatron_refuses_unknown()
    return found


def several(rank: RankInfo, ports: list[int], path: Path, routing: list[np.ndarray]) -> list[dict[str, Any]]:
    packs = recorded_packs([torch.from_numpy(ids) for ids in routing], "other")
    return [
        exercise(replace(rank, master_port=port), path, layout, packs, recompute)
        for (layout, recompute), port in zip(TWO_RANKS, ports, strict=True)
    ]


def own_routing(rank: RankInfo, path: Path) -> list[torch.Tensor]:
    """What the routers of one rank choose for each pack: [T, layers, k] int8, from the map that they return."""
    engine = start(rank, path, ParallelConfig())
    seen: list[torch.Tensor] = []

    def note(_router: Any, _inputs: Any, output: Any) -> None:
        seen.append(output[1].nonzero()[:, 1].view(-1, TOP_K).to(torch.int8))

    for router in routers(engine):
        router.register_forward_hook(note)
    engine.logp(engine.place(micro_batches()), TEMPERATURE)
    engine.close()
    return [torch.stack(seen[at : at + LAYERS], 1) for at in range(0, len(seen), LAYERS)]


def routers(engine: TrainerRank) -> list[Any]:
    from ctpo_megatron.mcore.model.routing import ReplayRouter

    return [module for model in engine.models for module in model.modules() if isinstance(module, ReplayRouter)]


def exercise(rank: RankInfo, path: Path, layout: dict[str, int], packs: list[Any], recompute: str) -> dict[str, Any]:
    """Log-probs before training, a step of maximum likelihood, and the weights after it."""
    engine = start(rank, path, ParallelConfig(**layout), recompute=recompute)
    per_rank = len(packs) // engine.parallel.dp
    mine = engine.place(packs[engine.coords.dp_rank * per_rank :][:per_rank])
    found: dict[str, Any] = {"dp_rank": engine.coords.dp_rank, "cp_rank": engine.coords.cp_rank}
    found["logp"] = [logp.numpy() for logp in engine.logp(mine, TEMPERATURE)]
    found["steps"] = [nll_step(engine, mine)]
    found["trained"] = exported(engine)
    left = [len(router._again) for router in routers(engine)]
    assert not any(left), f"micro-batches whose backward pass never came: {left}"
    engine.close()
    return found


def with_empty_pack(rank: RankInfo, path: Path) -> dict[str, Any]:
    """A step on one pack, and on it and what a second rank would get."""
    found = {}
    sample = TrainSample([5, 6, 7], [6, 7, 8], [True] * 3, [-1.0] * 3, [0] * 3, [1.0] * 3, group=0)
    (whole,), (empty,) = pack([sample], dp=2, max_tokens=8)
    assert (whole.sequences.lengths.tolist(), empty.sequences.lengths.tolist()) == ([3], [0])
    for case, packs in (("one pack", [whole]), ("and an empty one", [whole, empty])):
        engine = start(rank, path, ParallelConfig())
        found[case] = nll_step(engine, engine.place(packs))
        engine.close()
    return found


def megatron_mask_fails() -> bool:
    from megatron.core.transformer.moe.router import TopKRouter

    router = SimpleNamespace(enable_expert_bias=True, local_tokens_per_expert=torch.zeros(EXPERTS))
    routing_map, mask = torch.ones(3, EXPERTS, dtype=torch.bool), torch.tensor([False, False, True])
    try:
        TopKRouter._apply_expert_bias(router, routing_map, padding_mask=mask)
    except RuntimeError:
        return True
    return False


def gate_errors() -> dict[str, float]:
    """Each kind of gate under replay against its definition, with its gradient; every other token is left to the router."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    from ctpo_megatron.mcore.model.routing import Replay

    generator, errors = torch.Generator().manual_seed(1), {}
    logits = torch.randn(40, EXPERTS, generator=generator, dtype=torch.float64)
    target = torch.rand(40, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].to(torch.int8)
    target[::2] = -1
    bias = torch.randn(EXPERTS, generator=generator, dtype=torch.float64)
    cases = {
        "softmax over the chosen": ({"use_pre_softmax": False}, lambda s, i: s.gather(1, i).softmax(-1), lambda s: s),
        "softmax over all": ({"use_pre_softmax": True}, lambda s, i: s.softmax(-1).gather(1, i), lambda s: s),
        "sigmoid with bias": (
            {"score_function": "sigmoid", "expert_bias": bias},
            lambda s, i: s.sigmoid().gather(1, i) / s.sigmoid().gather(1, i).sum(-1, keepdim=True),
            lambda s: s.sigmoid() + bias,
        ),
    }
    for name, (options, gates, judged) in cases.items():
        replay, results = Replay(), []
        replay.routed_experts = target
        chosen = torch.where(target >= 0, target.long(), judged(logits).topk(TOP_K).indices)
        for ours in (True, False):
            leaf = logits.clone().requires_grad_()
            if ours:
                probs, _ = topk_routing_with_score_function(leaf, TOP_K, router_replay=replay, **options)
            else:
                probs = torch.zeros_like(leaf).scatter(1, chosen, gates(leaf, chosen))
            (probs * torch.arange(EXPERTS)).sum().backward()
            results.append((probs.detach(), leaf.grad))
        errors[name] = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    return errors


def megatron_refuses_unknown() -> bool:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    theirs = RouterReplay()
    RouterReplay.clear_global_router_replay_instances()
    theirs.set_target_indices(torch.tensor([[0, 1], [-1, -1]]))
    theirs.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    try:
        theirs.get_replay_topk(torch.randn(2, EXPERTS), TOP_K, default_compute_topk=None)
    except RuntimeError:
        return True
    return False
