"""Distillation from two teachers, one in the ranks and one on a server, beside CTPO at every layout. Real megatron-core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ctpo_megatron.algorithms import LocalScan
from ctpo_megatron.algorithms.distillation import weighted_signal
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.mcore import policy_terms
from ctpo_megatron.mcore.policy import update_policy
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.dist.test_reference import OPTIMIZER, other, start
from tests.support.numbers import flat
from tests.support.oracles_critic import prefix_weights_by_loop
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
COEFF, OBJECTIVE, GAMMA = 0.7, 0.5, 2.0
LAYOUTS = [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2}]
COPIED, SERVED, NOBODY = 0, 1, -1
TEACHERS = [
    {"name": "near", "type": "copied", "path": "n", "sources": ["train"]},
    {"name": "far", "type": "served", "path": "f", "sources": ["code"], "urls": ["http://h:1"]},
]
ALGORITHM = AlgorithmConfig.model_validate(
    {
        "anchor": "old",
        "distillation": {"coeff": COEFF, "objective_coeff": OBJECTIVE, "gamma": GAMMA, "teachers": TEACHERS},
    }
)
COMPARED = ("loss", "grad_norm", "teacher/kl", "teacher/weight", "teacher/kl/near", "teacher/kl/far", "teacher/kl/far weight")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"policy": write_model(tmp_path_factory.mktemp("policy"), "qwen3"), "other": other(tmp_path_factory.mktemp("other"))}


@pytest.fixture(scope="module")
def one_rank(models: dict[str, Path]) -> dict[str, Any]:
    return run_ranks(1, alone, models)[0]


def taught() -> list[MicroBatch]:
    """The packs with teachers in turn, over their borders; a server has said what it had to, the ranks are still to."""
    generator, found, number = torch.Generator().manual_seed(9), [], 0
    for pack in micro_batches():
        lengths = pack.sequences.lengths
        teachers = (torch.arange(number, number + len(lengths)) % 3) - 1
        number += len(lengths)
        of_token = teachers.repeat_interleave(lengths)
        said = -2 * torch.rand(pack.positions, generator=generator)
        said = torch.where(pack.tokens.mask & (of_token != NOBODY), torch.where(of_token == SERVED, said, torch.nan), 0.0)
        found.append(replace(pack.with_streams(teacher_logp=said), sequences=replace(pack.sequences, teachers=teachers)))
    return found


def test_the_loss_is_that_of_its_definition(one_rank: dict[str, Any]) -> None:
    """The first step's: CTPO's, whose ratio is 1, by its coefficient, and each taught sequence's token after token by its own."""
    loss, gaps, tokens = 0.0, {COPIED: [], SERVED: []}, 0
    for pack, logp, copied in zip(taught(), one_rank["logp"], one_rank["copied"], strict=True):
        bounds, stream = pack.sequences.cu_seqlens.tolist(), pack.tokens
        tokens += int(stream.mask.sum())
        loss -= OBJECTIVE * float(stream.advantages.double().sum())
        for begin, end, teacher in zip(bounds, bounds[1:], pack.sequences.teachers.tolist(), strict=False):
            if teacher == NOBODY:
                continue
            said = (torch.from_numpy(copied) if teacher == COPIED else stream.teacher_logp)[begin:end].double()
            mask = stream.mask[begin:end].tolist()
            gap = torch.where(stream.mask[begin:end], said - stream.rollout_logp[begin:end], 0.0).tolist()
            weights = prefix_weights_by_loop([abs(a) for a in gap], mask, GAMMA)
            loss -= COEFF * sum(w * a * float(x) for w, a, x in zip(weights, gap, logp[begin:end], strict=True))
            gaps[teacher] += [-a for a, wrote in zip(gap, mask, strict=True) if wrote]
    step = one_rank["step"]
    assert step["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert step["teacher/kl/near"] == pytest.approx(sum(gaps[COPIED]), rel=1e-4)
    assert step["teacher/kl/far"] == pytest.approx(sum(gaps[SERVED]), rel=1e-4)
    assert step["teacher/kl"] == pytest.approx(sum(gaps[COPIED]) + sum(gaps[SERVED]), rel=1e-4)
    assert step["teacher/kl/far weight"] == len(gaps[SERVED])


def test_every_layout_gives_the_same(models: dict[str, Path], one_rank: dict[str, Any]) -> None:
    """A prefix that ends at a shard's border, planted under context parallelism, would be seen."""
    answers = run_ranks(2, several, [free_port() for _ in range(len(LAYOUTS) + 1)], models)
    for place, layout in enumerate(LAYOUTS):
        for answer in answers:
            for key, value in one_rank["step"].items():
                assert answer[place][key] == pytest.approx(value, abs=TOLERANCE, rel=2 * TOLERANCE), f"{layout} {key}"
    for answer in answers:
        assert abs(answer[-1]["fault"] - one_rank["step"]["loss"]) > 100 * TOLERANCE


def test_a_teacher_that_was_not_asked_is_no_teacher_that_agrees(one_rank: dict[str, Any]) -> None:
    assert "loss" in one_rank["not asked"]


# ---- what runs in the ranks


def alone(rank: RankInfo, models: dict[str, Path]) -> dict[str, Any]:
    engine = start(rank, models["policy"], ParallelConfig(), OPTIMIZER)
    mine = engine.place(taught())
    found: dict[str, Any] = {"logp": [x.numpy() for x in engine.logp(mine, 1.0)]}
    with engine.using(engine.reference(str(models["other"]))):
        found["copied"] = [x.numpy() for x in engine.logp(mine, 1.0)]
    with pytest.raises(NonFiniteError) as refused:
        update(engine, {})
    found["not asked"] = str(refused.value)
    found["step"] = step(engine, models)
    engine.close()
    return found


def several(rank: RankInfo, ports: list[int], models: dict[str, Path]) -> list[dict[str, float]]:
    found = []
    for layout, port in zip(LAYOUTS, ports, strict=False):
        engine = start(replace(rank, master_port=port), models["policy"], ParallelConfig(**layout), OPTIMIZER)
        found.append(step(engine, models))
        engine.close()
    engine = start(replace(rank, master_port=ports[-1]), models["policy"], ParallelConfig(cp=2), OptimizerConfig(lr=0.0))

    def cut_off(signal: Any, scanned: Any, **options: Any) -> Any:
        bounds = options["cu_seqlens"] // 2
        return weighted_signal(signal, LocalScan().run(signal.channels, bounds), **options)

    with patch.object(policy_terms, "weighted_signal", cut_off):
        found.append({"fault": update(engine, copies(engine, models))["loss"]})
    engine.close()
    return found


def copies(engine: TrainerRank, models: dict[str, Path]) -> dict[int, Any]:
    return {COPIED: engine.reference(str(models["other"]))}


def step(engine: TrainerRank, models: dict[str, Path]) -> dict[str, float]:
    """Two updates with the same teachers; statistics of the first, and the second's loss as `again`."""
    teachers = copies(engine, models)
    first, second = update(engine, teachers), update(engine, teachers)
    return {key: first[key] for key in COMPARED} | {"again": second["loss"], "again kl": second["teacher/kl"]}


def update(engine: TrainerRank, teachers: dict[int, Any]) -> dict[str, float]:
    per_rank, packs = 4 // engine.parallel.dp, taught()
    tokens = sum(int(pack.tokens.mask.sum()) for pack in packs)
    share = [(p, p.sequences) for p in packs[engine.coords.dp_rank * per_rank :][:per_rank]]
    mine = [replace(p, sequences=replace(s, weights=s.weights / tokens)) for p, s in share]
    options = {"temperature": 1.0, "drift": DriftBounds(), "version": 0, "teachers": teachers}
    return flat(update_policy(engine, [mine], algorithm=ALGORITHM, **options))
