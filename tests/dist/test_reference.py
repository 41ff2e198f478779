"""A reference policy in host memory, and top-k log-probs, at every layout. Real megatron-core on gloo."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.algorithm import AlgorithmConfig, ReferenceConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import DppoObjective
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.mcore.host_weights import HostWeights
from ctpo_megatron.mcore.policy import update_policy
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.numbers import flat
from tests.support.ranks import at_own_port, free_port, run_ranks
from tests.support.tiny import VOCAB, micro_batches, write_model

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
COEFF = 0.5
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2)
LAYOUTS = [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2}]
TOP = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"policy": write_model(tmp_path_factory.mktemp("policy"), "qwen3"), "other": other(tmp_path_factory.mktemp("other"))}


@pytest.fixture(scope="module")
def one_rank(models: dict[str, Path]) -> dict[str, Any]:
    return run_ranks(1, alone, models)[0]


def test_reference_log_probs_are_those_of_its_own_engine(one_rank: dict[str, Any]) -> None:
    for through, own in zip(one_rank["reference_logp"], one_rank["other_logp"], strict=True):
        np.testing.assert_array_equal(through, own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swapping_back_is_exact_to_the_bit(one_rank: dict[str, Any], dtype: str) -> None:
    found = one_rank[dtype]
    assert found["changed inside"]
    assert found["weights"]
    assert found["optimizer"]
    assert found["after an error"]


def test_the_penalty_is_that_of_its_definition(one_rank: dict[str, Any]) -> None:
    """The first step's loss: the objective's, whose ratio is 1, and COEFF times the mean k3 of the log-probs at hand."""
    packs, expected, total, tokens = micro_batches(), 0.0, 0.0, 0
    for pack, old, ref in zip(packs, one_rank["logp"], one_rank["reference_logp"], strict=True):
        gap = torch.where(pack.tokens.mask, torch.from_numpy(old - ref).double(), 0.0).clamp(-10, 10)
        total += float((torch.exp(-gap) - 1 + gap).sum())
        tokens += int(pack.tokens.mask.sum())
        expected -= float(pack.tokens.advantages.double().sum())
    assert one_rank["step"]["kl"] == pytest.approx(total, rel=1e-4)
    assert one_rank["step"]["loss"] == pytest.approx((expected + COEFF * total) / tokens, rel=1e-3)


def test_every_layout_gives_the_same(models: dict[str, Path], one_rank: dict[str, Any]) -> None:
    answers = run_ranks(2, several, [free_port() for _ in LAYOUTS], models)
    for place, layout in enumerate(LAYOUTS):
        for answer in answers:
            for key, value in one_rank["step"].items():
                assert answer[place][key] == pytest.approx(value, abs=TOLERANCE, rel=2 * TOLERANCE), f"{layout} {key}"


def test_top_k_holds_some_tokens_back(one_rank: dict[str, Any]) -> None:
    tokens = sum(int(pack.tokens.mask.sum()) for pack in micro_batches())
    assert 0 < one_rank["step"]["topk clip_fraction"] < tokens


def test_top_k_divergence_is_measured_on_the_words_that_were_asked_for(one_rank: dict[str, Any]) -> None:
    """The sampling policy is the trainer's own, so the divergence is 0; at other words' log-probs it is not."""
    assert one_rank["topk same"] == pytest.approx(0.0, abs=1e-6)
    assert one_rank["topk moved"] > 0.1


def test_a_reference_of_another_shape_is_refused(one_rank: dict[str, Any]) -> None:
    assert "has another shape" in one_rank["error"]


# ---- what runs in the ranks


def other(directory: Path) -> Path:
    """The policy's shape with other weights."""
    from safetensors.torch import load_file, save_file

    write_model(directory, "qwen3")
    generator = torch.Generator().manual_seed(1)
    weights = load_file(directory / "model.safetensors")
    moved = {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def start(
    rank: RankInfo, path: Path, parallel: ParallelConfig, optimizer: OptimizerConfig = OPTIMIZER, **options: Any
) -> TrainerRank:
    return TrainerRank(str(path), parallel, optimizer, at_own_port(rank), device="cpu", seed=1, **options)


def alone(rank: RankInfo, models: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    engine = start(rank, models["other"], ParallelConfig())
    found["other_logp"] = [x.numpy() for x in engine.logp(engine.place(micro_batches()), 1.0)]
    engine.close()
    for dtype in ("bfloat16", "float32"):
        engine = start(rank, models["policy"], ParallelConfig(), dtype=dtype)
        found[dtype] = swaps(engine, str(models["other"]))
        if dtype == "float32":
            break
        engine.close()
    mine = engine.place(micro_batches())
    found["logp"] = [x.numpy() for x in engine.logp(mine, 1.0)]
    reference = engine.host_weights(str(models["other"]))
    with engine.using(reference):
        found["reference_logp"] = [x.numpy() for x in engine.logp(mine, 1.0)]
    found["step"] = step(engine, models)
    smaller = shutil.copytree(models["policy"], models["policy"].with_name("smaller"))
    config = (smaller / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    (smaller / "config.json").write_text(config.replace('"full_attention",\n    "full_attention"', '"full_attention"'))
    with pytest.raises(ConfigError) as refused:
        engine.host_weights(str(smaller))
    found["error"] = str(refused.value)
    engine.close()
    engine = start(rank, models["policy"], ParallelConfig(), OptimizerConfig(lr=0.0))
    found |= top_k(engine)
    engine.close()
    return found


def several(rank: RankInfo, ports: list[int], models: dict[str, Path]) -> list[dict[str, float]]:
    found = []
    for layout, port in zip(LAYOUTS, ports, strict=True):
        engine = start(replace(rank, master_port=port), models["policy"], ParallelConfig(**layout))
        found.append(step(engine, models))
        engine.close()
    return found


def step(engine: TrainerRank, models: dict[str, Path]) -> dict[str, float]:
    """Two optimizer steps of CTPO with the penalty; statistics of the first, and the second's loss as `again`."""
    per_rank = 4 // engine.parallel.dp
    packs = with_support(micro_batches())
    tokens = sum(int(pack.tokens.mask.sum()) for pack in packs)
    share = [(p, p.sequences) for p in packs[engine.coords.dp_rank * per_rank :][:per_rank]]
    mine = [replace(p, sequences=replace(s, weights=s.weights / tokens)) for p, s in share]
    penalised = AlgorithmConfig(anchor="old", reference=ReferenceConfig(coeff=COEFF))
    top_k = AlgorithmConfig(objective=DppoObjective(divergence="topk_tv", delta=0.4, ratio_cap=None))
    reference = engine.host_weights(str(models["other"]))

    def update(algorithm: AlgorithmConfig, reference: HostWeights | None) -> dict[str, float]:
        drift = DriftBounds()
        options = {"temperature": 1.0, "drift": drift, "version": 0, "reference": reference}
        return flat(update_policy(engine, [mine], algorithm=algorithm, **options))

    first, second, third = update(penalised, reference), update(penalised, reference), update(top_k, None)
    found = {key: first[key] for key in ("loss", "grad_norm", "kl")} | {"again": second["loss"], "again kl": second["kl"]}
    return found | {f"topk {key}": third[key] for key in ("loss", "grad_norm", "clip_fraction")}


def with_support(packs: list[MicroBatch]) -> list[MicroBatch]:
    """The packs with top-k words that nobody sampled: the first is the label every other time, the last is unused."""
    generator = torch.Generator().manual_seed(8)
    found = []
    for pack in packs:
        ids = torch.randint(0, VOCAB, (pack.positions, TOP), generator=generator)
        ids[::2, 0] = pack.tokens.labels[::2]
        logp = torch.rand(ids.shape, generator=generator).mul_(2 / TOP).log_()
        logp[:, -1] = -torch.inf
        found.append(pack.with_streams(top_k_ids=ids.int(), top_k_logp=logp))
    return found


def swaps(engine: TrainerRank, other_path: str) -> dict[str, bool]:
    """What changes and what does not, on weights and on everything the optimizer holds."""

    def optimizer() -> list[torch.Tensor]:
        groups = [group for each in engine.optimizer.chained_optimizers for group in each.optimizer.param_groups]
        return [p.detach().clone() for group in groups for p in group["params"]]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    weights, kept = HostWeights.take(engine.models).tensors, optimizer()
    reference = engine.host_weights(other_path)
    with engine.using(reference):
        found = {"changed inside": not same(HostWeights.take(engine.models).tensors, weights)}
    found["weights"] = same(HostWeights.take(engine.models).tensors, weights)
    found["optimizer"] = same(optimizer(), kept)
    with pytest.raises(RuntimeError, match="on purpose"), engine.using(reference):
        raise RuntimeError("on purpose")
    found["after an error"] = same(HostWeights.take(engine.models).tensors, weights)
    return found


def top_k(engine: TrainerRank) -> dict[str, float]:
    """The largest top-k divergence that DPPO sees, under the trainer's own log-probs and under others."""
    from ctpo_megatron.algorithms.divergence import divergence_from_rollout
    from ctpo_megatron.algorithms.tokens import Given
    from ctpo_megatron.mcore.policy_terms import support_of

    pack = micro_batches()[0]
    ids = torch.stack([torch.randperm(VOCAB, generator=torch.Generator().manual_seed(t))[:TOP] for t in range(pack.positions)])
    own: list[torch.Tensor] = []
    largest: list[float] = []

    def share(logp: torch.Tensor, mb: Any, _scan: Any) -> Any:
        own[:] = [mb.tokens.policy_top_k_logp, logp.detach()]
        mb = mb.with_streams(rollout_logp=logp.detach())
        support = support_of(mb, logp)
        given = Given(logp.detach(), mb.tokens.rollout_logp, mb.tokens.advantages, mb.tokens.mask, logp.detach() * 0, support)
        largest.append(float(divergence_from_rollout(DppoObjective(divergence="topk_tv").divergence, given).max()))
        return logp.sum() * 0, Stats()

    for logp in (torch.full((pack.positions, TOP), -2.0), None):
        mine = pack.with_streams(top_k_ids=ids.int(), top_k_logp=own[0] if logp is None else logp)
        engine.train_step(engine.place([mine]), share, 1.0)
    return {"topk moved": largest[0], "topk same": largest[1]}
