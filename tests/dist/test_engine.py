"""The engine gives the same numbers at every layout, and those of transformers. Real megatron-core on gloo."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.algorithms import Stats, policy_loss
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import ConfigError, NonFiniteError
from ctpo_megatron.mcore.host import megatron_region
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.parallel import zigzag_unshard
from tests.support.numbers import flat
from tests.support.ranks import at_own_port, free_port, run_ranks
from tests.support.tiny import FAMILIES, micro_batches, transformers_logp, write_model

pytestmark = pytest.mark.dist

TEMPERATURE = 0.7
TOLERANCE = 1e-5
# a large eps keeps AdamW smooth: with the usual one an entry whose gradient is rounding noise moves by a full lr
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2, warmup_steps=2, weight_decay=0.1)

SCHEDULES = ("constant", "linear", "cosine", "inverse-square-root", "wsd")
RECOMPUTE = [("selective", "qwen3"), ("selective", "qwen3_moe"), ("full", "qwen3"), ("full", "qwen3_moe")]

TWO_RANKS = [
    ("qwen3", {"dp": 2}),
    ("qwen3", {"tp": 2}),
    ("qwen3", {"pp": 2}),
    ("qwen3", {"cp": 2}),
    ("qwen3_moe", {"dp": 2}),
    ("qwen3_moe", {"tp": 2}),
    ("qwen3_moe", {"cp": 2}),
    ("qwen3_moe", {"dp": 2, "ep": 2}),
    ("qwen3_moe", {"tp": 2, "ep": 2}),
]
FOUR_RANKS = [
    ("qwen3", {"tp": 2, "cp": 2}),
    ("qwen3", {"pp": 2, "cp": 2}),
    ("qwen3_moe", {"tp": 2, "dp": 2, "ep": 4}),
    ("qwen3_moe", {"pp": 2, "cp": 2, "ep": 2}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def one_rank(models: dict[str, Path]) -> dict[str, Any]:
    return run_ranks(1, alone, models)[0]


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, Path]) -> list[dict[str, Any]]:
    # a new meeting point for each engine: ranks leave the old one at different times
    return run_ranks(2, pair, [free_port() for _ in range(len(TWO_RANKS) + 2)], models)


def test_one_rank_agrees_with_transformers(models: dict[str, Path], one_rank: dict[str, Any]) -> None:
    for family, path in models.items():
        expected, loss, norm = transformers_logp(path, TEMPERATURE)
        found = one_rank[family]
        for theirs, ours in zip(expected, found["logp"], strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=TOLERANCE, rtol=0, err_msg=family)
        assert found["steps"][0]["loss"] == pytest.approx(loss, abs=TOLERANCE), family
        if family != "qwen3_moe":  # there the engine adds the load-balancing loss
            assert found["steps"][0]["grad_norm"] == pytest.approx(norm, abs=TOLERANCE, rel=TOLERANCE), family


def test_export_gives_back_what_was_loaded(models: dict[str, Path], one_rank: dict[str, Any]) -> None:
    from safetensors.numpy import load_file

    for family, path in models.items():
        stored = load_file(path / "model.safetensors")
        assert stored.keys() == one_rank[family]["exported"].keys()
        for name, value in stored.items():
            np.testing.assert_array_equal(one_rank[family]["exported"][name], value, err_msg=name)


def test_training_moves_the_weights_and_the_load_balancing_loss_counts(one_rank: dict[str, Any]) -> None:
    for family in FAMILIES:
        before, after = one_rank[family]["exported"], one_rank[family]["trained"]
        still = [name for name in before if np.abs(after[name] - before[name]).max() < 10 * TOLERANCE]
        assert not still, f"{family}: not trained: {still}"
    assert one_rank["without_aux_grad_norm"] != pytest.approx(one_rank["qwen3_moe"]["steps"][0]["grad_norm"], abs=1e-3)


def test_learning_rate_warms_up_from_the_first_step(one_rank: dict[str, Any]) -> None:
    rates = [step["lr"] for step in one_rank["qwen3"]["steps"]]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(("mode", "family"), RECOMPUTE)
def test_recompute_changes_nothing(one_rank: dict[str, Any], mode: str, family: str) -> None:
    found, expected = one_rank["recompute"][mode, family], one_rank[family]
    assert found["steps"] == expected["steps"]
    for name, value in expected["trained"].items():
        np.testing.assert_array_equal(found["trained"][name], value, err_msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates(one_rank: dict[str, Any], schedule: str) -> None:
    """Ten steps, two of them warm-up, from 1 towards 0.1, which would be the eleventh step's."""
    fall = {
        "constant": lambda k: 1.0,
        "linear": lambda k: 1.0 - 0.9 * (k - 2) / 9,
        "cosine": lambda k: 0.1 + 0.45 * (1 + math.cos(math.pi * (k - 2) / 9)),
        "inverse-square-root": lambda k: math.sqrt(2 / k),
        "wsd": lambda k: 1.0 if k <= 7 else 1.0 - 0.9 * (k - 7) / 4,
    }
    expected = [0.5, *(fall[schedule](k) for k in range(2, 11))]
    assert one_rank["rates"][schedule] == pytest.approx(expected)


def test_rate_zero_changes_no_weight(one_rank: dict[str, Any]) -> None:
    assert one_rank["rate_zero_grad_norm"] > 0.1
    assert one_rank["rate_zero_change"] == 0.0


def test_an_engine_without_optimizer_computes_log_probs_and_cannot_train(one_rank: dict[str, Any]) -> None:
    for ours, theirs in zip(one_rank["frozen_logp"], one_rank["qwen3"]["logp"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert "without an optimizer" in one_rank["frozen_error"]


def test_schedules_that_end_need_to_know_the_steps(one_rank: dict[str, Any]) -> None:
    assert "optimizer.schedule is cosine" in one_rank["refused"]["cosine"]
    assert "the run has None optimizer steps" in one_rank["refused"]["cosine"]
    assert "optimizer.wsd_decay_steps = 4" in one_rank["refused"]["wsd"]
    assert "the run has 5 optimizer steps; it needs at least 6" in one_rank["refused"]["wsd"]


def test_optimizers_for_gpus_are_refused_elsewhere(one_rank: dict[str, Any]) -> None:
    assert "needs the FusedAdam of TransformerEngine" in one_rank["refused"]["precision_aware"]
    assert "the trainer runs on cpu, where it already is" in one_rank["refused"]["cpu_offload"]


def test_two_ranks(two_ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    for i, (family, layout) in enumerate(TWO_RANKS):
        compare(join([answer["layouts"][i] for answer in two_ranks]), one_rank[family], f"{family} {layout}")


def test_four_ranks(models: dict[str, Path], one_rank: dict[str, Any]) -> None:
    ports = [free_port() for _ in FOUR_RANKS]
    answers = run_ranks(4, several, FOUR_RANKS, ports, models)
    for i, (family, layout) in enumerate(FOUR_RANKS):
        compare(join([answer[i] for answer in answers]), one_rank[family], f"{family} {layout}")


def test_what_is_not_finite_raises_on_every_rank_and_leaves_the_weights(two_ranks: list[dict[str, Any]]) -> None:
    for answer in two_ranks:
        assert answer["not_finite"] == {
            "errors": [
                "loss is nan",
                "grad_norm is nan",
                "the log-prob of a token that the policy wrote is NaN or infinite: sequence 0, policy token 3 "
                "(sequences of a rollout batch count from 0, tokens from 1)",
            ],
            "change": 0.0,
        }


def test_bfloat16(two_ranks: list[dict[str, Any]], one_rank: dict[str, Any]) -> None:
    found = two_ranks[0]["bfloat16"]
    assert found["dtype"] == "torch.bfloat16"
    reference = one_rank["qwen3"]["steps"]
    for ours, theirs in zip(found["steps"], reference[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)


def join(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Whole packs from shards, in the order of `micro_batches`; the rest from rank 0, after all ranks proved to agree."""
    packs = micro_batches()
    shards: dict[int, dict[int, list[np.ndarray]]] = {}
    for rank in ranks:
        assert rank["steps"] == ranks[0]["steps"]
        if rank["logp"]:
            shards.setdefault(rank["dp_rank"], {})[rank["cp_rank"]] = rank["logp"]
    logp = []
    for _, by_cp in sorted(shards.items()):
        for pieces in zip(*(by_cp[cp] for cp in sorted(by_cp)), strict=True):
            whole = zigzag_unshard([torch.from_numpy(piece) for piece in pieces], packs[len(logp)].sequences.cu_seqlens)
            logp.append(whole.numpy())
    return {**ranks[0], "logp": logp}


def compare(found: dict[str, Any], expected: dict[str, Any], case: str) -> None:
    for ours, theirs in zip(found["logp"], expected["logp"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0, err_msg=case)
    for number, (ours, theirs) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=TOLERANCE), f"{case}, step {number}"
    for key in ("exported", "trained"):
        assert found[key].keys() == expected[key].keys()
        for name, value in expected[key].items():
            np.testing.assert_allclose(found[key][name], value, atol=TOLERANCE, rtol=0, err_msg=f"{case}, {key} {name}")


# ---- what runs in the ranks


def alone(rank: RankInfo, models: dict[str, Path]) -> dict[str, Any]:
    """Everything that one rank can show, in one process."""
    found: dict[str, Any] = {family: exercise(rank, path, ParallelConfig()) for family, path in models.items()}
    found["recompute"] = {
        (mode, family): exercise(rank, models[family], ParallelConfig(), recompute=mode) for mode, family in RECOMPUTE
    }

    engine = start(rank, models["qwen3"], ParallelConfig(), optimizer=OptimizerConfig(lr=0.0, weight_decay=0.5))
    before = exported(engine)
    found["rate_zero_grad_norm"] = nll_step(engine, engine.place(micro_batches()))["grad_norm"]
    found["rate_zero_change"] = largest_change(before, exported(engine))
    engine.close()

    engine = start(rank, models["qwen3"], ParallelConfig(), optimizer=None)
    mine = engine.place(micro_batches())
    found["frozen_logp"] = [logp.numpy() for logp in engine.logp(mine, TEMPERATURE)]
    with pytest.raises(ConfigError) as refused:
        nll_step(engine, mine)
    found["frozen_error"] = str(refused.value)
    engine.close()

    engine = start(rank, models["qwen3_moe"], ParallelConfig())
    from megatron.core.transformer.moe.router import TopKRouter

    for module in engine.models[0].modules():
        if isinstance(module, TopKRouter):
            module.routing_type = "none"
    found["without_aux_grad_norm"] = nll_step(engine, engine.place(micro_batches()))["grad_norm"]
    engine.close()

    found["rates"], found["refused"] = learning_rates(rank, models["qwen3"])
    return found


def learning_rates(rank: RankInfo, path: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The first ten rates of each schedule, and why some optimizers are refused."""
    from ctpo_megatron.mcore.optimizer import build_optimizer, build_schedule, check_optimizer

    engine = start(rank, path, ParallelConfig())
    rates: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    for name in SCHEDULES:
        with megatron_region(engine.device):
            optimizer = build_optimizer(engine.models, scheduled(name), torch.float32)
        schedule = build_schedule(optimizer, scheduled(name), 10)
        for _ in range(10):
            schedule.step(1)
            rates[name].append(optimizer.param_groups[0]["lr"])
    calls = {
        "cosine": lambda: build_schedule(engine.optimizer, scheduled("cosine"), None),
        "wsd": lambda: build_schedule(engine.optimizer, scheduled("wsd"), 5),
        "precision_aware": lambda: check_optimizer(OptimizerConfig(precision_aware=True), engine.device, torch.bfloat16),
        "cpu_offload": lambda: check_optimizer(OptimizerConfig(cpu_offload=0.5), engine.device, torch.float32),
    }
    refused = {}
    for name, call in calls.items():
        with pytest.raises(ConfigError) as caught:
            call()
        refused[name] = str(caught.value)
    engine.close()
    return rates, refused


def scheduled(name: str) -> OptimizerConfig:
    wsd = 4 if name == "wsd" else None
    return OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=2, schedule=name, wsd_decay_steps=wsd)


def pair(rank: RankInfo, ports: list[int], models: dict[str, Path]) -> dict[str, Any]:
    """Everything that takes two ranks, in one set of processes."""
    *ports, last, next_to_last = ports
    return {
        "layouts": several(rank, TWO_RANKS, ports, models),
        "not_finite": not_finite(replace(rank, master_port=next_to_last), models["qwen3"]),
        "bfloat16": bfloat16(replace(rank, master_port=last), models["qwen3"]),
    }


def several(
    rank: RankInfo, cases: list[tuple[str, dict[str, int]]], ports: list[int], models: dict[str, Path]
) -> list[dict[str, Any]]:
    return [
        exercise(replace(rank, master_port=port), models[family], ParallelConfig(**layout))
        for (family, layout), port in zip(cases, ports, strict=True)
    ]


def start(
    rank: RankInfo, path: Path, parallel: ParallelConfig, optimizer: OptimizerConfig | None = OPTIMIZER, **options: Any
) -> TrainerRank:
    return TrainerRank(str(path), parallel, optimizer, at_own_port(rank), device="cpu", seed=1, **options)


def exercise(rank: RankInfo, path: Path, parallel: ParallelConfig, **options: Any) -> dict[str, Any]:
    """Log-probs, two steps of maximum likelihood, two of CTPO, and the weights before and after."""
    engine = start(rank, path, parallel, **options)
    per_rank = 4 // engine.parallel.dp
    mine = engine.place(micro_batches()[engine.coords.dp_rank * per_rank :][:per_rank])
    found: dict[str, Any] = {"dp_rank": engine.coords.dp_rank, "cp_rank": engine.coords.cp_rank, "exported": exported(engine)}
    logp = engine.logp(mine, TEMPERATURE)
    found["logp"] = [x.numpy() for x in logp]
    found["steps"] = [nll_step(engine, mine), nll_step(engine, mine)]
    if logp:  # by now two steps old
        mine = [pack.with_streams(anchor_logp=old) for pack, old in zip(mine, logp, strict=True)]
    found["steps"] += [flat(engine.train_step(mine, ctpo, TEMPERATURE)) for _ in range(2)]
    found["trained"] = exported(engine)
    engine.close()
    return found


def nll_step(engine: TrainerRank, mine: list[Any]) -> dict[str, float]:
    tokens = sum(int(pack.tokens.mask.sum()) for pack in micro_batches())

    def share(logp: Any, pack: Any, _scan: Any) -> Any:
        picked = torch.where(pack.tokens.mask, logp, 0.0)
        extremes = {"maxima": {"logp_max": picked.max()}, "minima": {"logp_min": picked.min()}}
        return -picked.sum() / tokens, Stats(sums={"logp": picked.sum()}, **extremes)

    return flat(engine.train_step(mine, share, TEMPERATURE))


def ctpo(logp: Any, pack: Any, scan: Any) -> Any:
    out = policy_loss(
        {"type": "ctpo"},
        logp=logp,
        old_logp=pack.tokens.anchor_logp,
        advantages=pack.tokens.advantages,
        mask=pack.tokens.mask,
        cu_seqlens=pack.sequences.cu_seqlens,
        normalizer=11.0,  # sequences of all packs
        scan=scan,
    )
    return out.loss, out.stats


def exported(engine: TrainerRank) -> dict[str, np.ndarray]:
    """Whole weights on rank 0, nothing elsewhere. Small buckets, so that there are several."""
    return {name: tensor.float().numpy().copy() for bucket in engine.stream(64 * 1024, to=0) for name, tensor in bucket}


def largest_change(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    return max((float(np.abs(after[name] - before[name]).max()) for name in before), default=0.0)


def not_finite(rank: RankInfo, path: Path) -> dict[str, Any]:
    """Only rank 0 makes a bad loss, then a bad gradient, then one bad log-prob that an objective sees."""
    engine = start(rank, path, ParallelConfig(dp=2))
    mine = engine.place(micro_batches()[2 * engine.coords.dp_rank :][:2])
    before, errors = exported(engine), []
    bad_loss = float("nan") if rank.rank == 0 else 1.0
    bad_gradient = 0.0 if rank.rank == 0 else 1.0  # the slope of a root is infinite at 0

    for share in (
        lambda logp, _pack, _scan: (logp.sum() * bad_loss, Stats()),
        lambda logp, _pack, _scan: ((logp * bad_gradient).square().sum().sqrt(), Stats()),
    ):
        with pytest.raises(NonFiniteError) as caught:
            engine.train_step(mine, share, 1.0)
        errors.append(str(caught.value).split(";")[0])
    place = int(mine[0].tokens.mask.nonzero()[2])

    def bad_logp(logp: Any, pack: Any, scan: Any) -> Any:
        bad = torch.zeros_like(logp).index_fill_(0, torch.tensor([place]), float("nan") if rank.rank == 0 else 0.0)
        return ctpo(logp + bad, replace_old(pack, logp), scan)

    with pytest.raises(NonFiniteError) as caught:
        engine.train_step(mine, bad_logp, 1.0)
    errors.append(str(caught.value).split(". ")[0])
    change = largest_change(before, exported(engine))
    engine.close()
    return {"errors": errors, "change": change}


def replace_old(pack: Any, logp: Any) -> Any:
    return pack.with_streams(anchor_logp=logp.detach())


def bfloat16(rank: RankInfo, path: Path) -> dict[str, Any]:
    engine = start(rank, path, ParallelConfig(dp=2), dtype="bfloat16")
    mine = engine.place(micro_batches()[2 * engine.coords.dp_rank :][:2])
    found = {"dtype": str(next(engine.models[0].parameters()).dtype)}
    found["steps"] = [nll_step(engine, mine), nll_step(engine, mine)]
    engine.close()
    return found
