"""Prompts that are read once change nothing: losses, gradients and weights are those of samples that read their own.

On gloo with the real megatron-core, two optimizer steps in an update, at one rank and at DP2, TP2, PP2 and CP2.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import SequenceMean
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.record.values import scalar
from ctpo_megatron.types import TrainSample
from tests.support.parity import OPTIMIZER, begin_again, exported
from tests.support.ranks import at_own_port, free_port, run_ranks
from tests.support.tiny import VOCAB, write_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

LAYOUTS: dict[str, dict[str, int]] = {"DP2": {"dp": 2}, "TP2": {"tp": 2}, "PP2": {"pp": 2}, "CP2": {"cp": 2}}
FAMILIES = ("qwen3", "llama")  # llama: rotary embeddings in several bands
TEMPERATURE, MAX_TOKENS, SHARE_FROM = 0.7, 64, 4
ALGORITHM = AlgorithmConfig(anchor="old")
WITH_CRITIC = AlgorithmConfig.model_validate({"anchor": "old", "advantage": {"type": "gae"}})
NUMBERS = ("loss", "grad_norm", "entropy", "ratio", "kl_old", "drift/mean")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    models = {family: write_model(tmp_path_factory.mktemp(family), family, 2) for family in FAMILIES}
    ports = [free_port() for _ in range(len(LAYOUTS) + 1)]
    (alone,) = run_ranks(1, at_one_rank, models)
    return {**alone, **run_ranks(2, at_two_ranks, models["qwen3"], ports)[0]}


PATHS = ["qwen3", "llama", "qwen3, recomputed", "qwen3, portable", "qwen3, with a critic", *LAYOUTS, "CP2, portable"]


@pytest.mark.parametrize("layout", PATHS)
def test_a_prompt_that_is_read_once_changes_nothing(found: dict[str, Any], layout: str) -> None:
    shared, apart = found[layout]["shared"], found[layout]["apart"]
    for name in NUMBERS:
        assert shared[name] == pytest.approx(apart[name], rel=1e-5, abs=1e-6), name
    for key, weight in apart["weights"].items():
        np.testing.assert_allclose(shared["weights"][key], weight, rtol=0, atol=1e-6, err_msg=key)
    np.testing.assert_allclose(shared["logp"], apart["logp"], rtol=0, atol=2e-5)
    assert shared["positions"] < 0.8 * apart["positions"], "a case that shares next to nothing compares nothing"


@pytest.mark.parametrize(
    ("path", "fault"),
    [("qwen3", "without its prompt"), ("qwen3, portable", "positions from 0"), ("qwen3, portable", "without its prompt")],
)
def test_a_planted_fault_shows(found: dict[str, Any], path: str, fault: str) -> None:
    wrong, apart = found[path][fault], found[path]["apart"]
    assert abs(wrong["grad_norm"] - apart["grad_norm"]) > 1e-3 * apart["grad_norm"]


# ---- what runs in the ranks


def at_one_rank(rank: RankInfo, models: dict[str, Path]) -> dict[str, Any]:
    compiled = {"without its prompt": ("compiled_layout", alone_compiled)}
    portable = {
        "positions from 0": ("rotary_positions", lambda *_: nullcontext()),
        "without its prompt": ("packed_layout", alone),
    }
    found = {family: at(rank, model, ParallelConfig(), compiled if family == "qwen3" else {}) for family, model in models.items()}
    found["qwen3, portable"] = at(rank, models["qwen3"], ParallelConfig(), portable, compiles=False)
    found["qwen3, recomputed"] = at(rank, models["qwen3"], ParallelConfig(), recompute="full")
    return found | {"qwen3, with a critic": at(rank, models["qwen3"], ParallelConfig(), algorithm=WITH_CRITIC)}


def at_two_ranks(rank: RankInfo, model: Path, ports: list[int]) -> dict[str, dict[str, Any]]:
    *of_layouts, last = ports
    places = zip(LAYOUTS.items(), of_layouts, strict=True)
    found = {name: at(replace(rank, master_port=port), model, ParallelConfig(**sizes)) for (name, sizes), port in places}
    return found | {"CP2, portable": at(replace(rank, master_port=last), model, ParallelConfig(cp=2), compiles=False)}


def at(
    rank: RankInfo,
    model: Path,
    parallel: ParallelConfig,
    faults: Mapping[str, tuple[str, Callable]] = MappingProxyType({}),
    *,
    compiles: bool = True,
    recompute: str = "none",
    algorithm: AlgorithmConfig = ALGORITHM,
) -> dict[str, Any]:
    placed = at_own_port(rank) if parallel == ParallelConfig() else rank
    options: dict[str, Any] = {"device": "cpu", "seed": 1, "recompute": recompute, "critic": algorithm.critic}
    engine = TrainerRank(str(model), parallel, OPTIMIZER, placed, **options)
    assert engine._stepper.compiled, "the model is one that both ways compute"
    engine._stepper.compiled = compiles
    found = {"apart": trained(engine, None, algorithm), "shared": trained(engine, SHARE_FROM, algorithm)}
    for name, (seam, fault) in faults.items():
        import ctpo_megatron.mcore.step as step

        before = getattr(step, seam)
        setattr(step, seam, fault)
        found[name] = trained(engine, SHARE_FROM, algorithm)
        setattr(step, seam, before)
    engine.close()
    return found


def alone(sequences: Any, *where: Any) -> Any:
    """The layout of branches that see themselves only, at their own positions."""
    from ctpo_megatron.mcore.model.attention import packed_layout

    layout = packed_layout(replace(sequences, prefixes=None), *where)
    layout.positions, layout.max_seqlen_kv = packed_layout(sequences, *where).positions, 64
    return layout


def alone_compiled(sequences: Any, *where: Any) -> Any:
    """The same of compiled attention."""
    from ctpo_megatron.mcore.model.attention import compiled_layout

    return compiled_layout(replace(sequences, prefixes=None), *where)


def draw_samples() -> list[TrainSample]:
    """Three groups of four that share a prompt of 9 to 14 tokens, one whose prompts differ, and a gap in each response."""
    rng, samples = random.Random(5), []
    for group in range(4):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(9, 14))]
        for _ in range(4):
            own = prompt if group < 3 else [rng.randrange(VOCAB) for _ in range(6)]
            response = [rng.randrange(VOCAB) for _ in range(rng.randint(3, 11))]
            tokens, advantage = own + response, rng.gauss(0.0, 1.0)
            mask = [place >= len(own) - 1 and place != len(own) + 1 for place in range(len(tokens) - 1)]
            samples.append(
                TrainSample(
                    input_ids=tokens[:-1],
                    labels=tokens[1:],
                    mask=mask,
                    rollout_logp=[rng.uniform(-7, -4) if mine else 0.0 for mine in mask],
                    versions=[0 if mine else -1 for mine in mask],
                    advantages=[advantage if mine else 0.0 for mine in mask],
                    group=group,
                )
            )
    return samples


def rewarded(sample: TrainSample) -> TrainSample:
    """The sample for a critic, with a reward at its last token."""
    nothing = [0.0] * len(sample)
    return replace(sample, advantages=nothing, rewards=[*nothing[:-1], sample.advantages[-1]])


def trained(engine: TrainerRank, share_from: int | None, algorithm: AlgorithmConfig = ALGORITHM) -> dict[str, Any]:
    """Two optimizer steps from the model's weights, and the log-probs of what the policy wrote before them."""
    from ctpo_megatron.mcore.model.value_head import value_head
    from ctpo_megatron.mcore.policy import update_policy

    if (head := value_head(engine.models)) is not None:
        for weight in head.parameters():
            weight.detach().fill_(0.1)
    begin_again(engine)
    options = {"aggregation": SequenceMean(), "parallel": engine.parallel, "max_tokens": MAX_TOKENS, "share_from": share_from}
    samples = [rewarded(sample) if algorithm.critic else sample for sample in draw_samples()]
    batches = [build_train_batch(samples[first : first + 8], first_id=first, **options) for first in (0, 8)]
    mine = [batch.micro_batches[engine.coords.dp_rank] for batch in batches]
    logp = by_sample(engine, mine)
    values = update_policy(engine, mine, algorithm=algorithm, temperature=TEMPERATURE, drift=DriftBounds(), version=0)
    found = {name: scalar(values[name]) for name in NUMBERS}
    positions = sum(mb.positions for batch in batches for row in batch.micro_batches for mb in row)
    return found | {"weights": exported(engine), "positions": positions, "logp": logp}


def by_sample(engine: TrainerRank, batches: list[Any]) -> list[float]:
    """Log-probs of what the policy wrote, sample by sample; of one rank alone, nothing elsewhere."""
    if engine.parallel != ParallelConfig():
        return []
    from ctpo_megatron.data.dumps import sequences_of

    found: dict[int, list[float]] = {}
    for batch in batches:
        for mb, logp in zip(batch, engine.logp(engine.place(batch), TEMPERATURE), strict=True):
            for _, rows, number in sequences_of(mb):
                found[number] = logp[rows[mb.tokens.mask[rows]]].tolist()
    return [value for number in sorted(found) for value in found[number]]
