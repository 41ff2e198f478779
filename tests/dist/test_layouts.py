"""The same loss however a batch is spread: over packs, micro-batches, data-parallel replicas and context-parallel ranks.

One pack on one rank is held against the definitions (the oracles of the unit tests), every other spread against that pack:
token losses and gradients to the last bit where sums are exact, the loss to 1e-12 (float32: 1e-6). Two exceptions are named
where they are allowed: CPPO's position-weighted sum and SAPO's sigmoid.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from faults import ACROSS_RANKS, EVERYWHERE
from oracles_batch import Options
from oracles_cases import Case, Shape, draw_case
from ranks import run_ranks
from spread import Found, Ranks, Shares, Spread, in_one_pack, joined, shares
from torch import Tensor

from ctpo_megatron.algorithms import LocalScan, raise_if_nonfinite
from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.mcore.engine import RankInfo

pytestmark = pytest.mark.dist

RANKS = 4
# one letter per token: P, p written by the policy, T, t by a tool; capitals: a new policy version begins
SEQUENCES = ("p", "pppttpptpppptPpptpppp", "tttt", "ttptPpptppTppt", "", "pptppptpPpp", "pPp", "p" * 17)

OBJECTIVES: list[Options] = [
    {"type": "ctpo"},
    {"type": "ctpo", "ratio": "geomean"},
    {"type": "ctpo", "clip_low": 0.693, "clip_high": 1.609, "dual_clip": 1.609, "power": 0.0},
    {"type": "ctpo", "clip_low": 0.5, "clip_high": 0.8, "dual_clip": None, "power": -0.5},
    {"type": "grpo"},
    {"type": "grpo", "clip_high": 0.28, "dual_clip": None},
    {"type": "gspo", "clip_low": 0.05, "clip_high": 0.02},
    {"type": "sequence", "clip_low": 0.5, "clip_high": 4.0},
    {"type": "sapo"},
    {"type": "cispo", "clip_low": 0.3, "clip_high": 4.0},
    {"type": "gmpo"},
    {"type": "minpro", "form": "weight"},
    {"type": "minpro", "form": "ppo"},
    {"type": "dppo", "divergence": "binary_tv"},
    {"type": "dppo", "divergence": "topk_kl", "delta": 0.05, "ratio_cap": None},
    {"type": "cppo"},
    {"type": "cppo", "divergence": "binary_kl", "adaptive_budget": True},
    {"type": "cppo", "divergence": "topk_tv", "adaptive_budget": True, "weight_min": 0.3},
    {"type": "trm", "mean_divergence": 0.02},
    {"type": "trm", "divergence": "k2", "max_divergence": 0.05, "mean_divergence": 0.02},
    {"type": "trm", "divergence": "binary_tv", "max_divergence": 0.05, "mean_divergence": None},
    {"type": "trm", "divergence": "topk_kl", "max_divergence": 0.05, "mean_divergence": 0.02},
]
AGGREGATIONS = ("balanced", "sequence-mean", "token-mean", {"type": "constant", "tokens": 64}, "sequence-sum")
CORRECTIONS: list[Options | None] = [
    None,
    {"type": "truncate", "level": "prefix", "low": 0.3, "high": 2.0},
    {"type": "mask", "level": "sequence", "low": 0.05, "high": 20.0},
    {"type": "truncate", "level": "geometric", "low": 0.3, "high": 2.0},
    {"type": "icepop", "low": 0.1, "high": 3.0},
]
ON_ROLLOUT = ("dppo", "cppo", "trm")  # take no correction

CUTS = ((1, "zigzag"), (2, "zigzag"), (2, "contiguous"), (4, "zigzag"), (4, "contiguous"))
SPREADS = [
    *(Spread(cp, layout, n, order) for (cp, layout), n, order in product(CUTS, (1, 2, 3), (0, 1, 2))),
    *(Spread(cp, layout, 2, 1, dtype="float32") for cp, layout in CUTS),
    *(Spread(cp, layout, 2, 2, exact=False) for cp, layout in CUTS),
    *(Spread(cp, layout, 1, 2, part=5) for cp, layout in CUTS),
]


def shapes(restarts: bool) -> list[Shape]:
    return [[(letter in "Pp", restarts and letter.isupper()) for letter in letters] for letters in SEQUENCES]


def draw_cases() -> list[Case]:
    """Every objective once, with aggregations, corrections and new versions in changing combinations."""
    cases = []
    for number, objective in enumerate(OBJECTIVES):
        correction = None if objective["type"] in ON_ROLLOUT else CORRECTIONS[number % len(CORRECTIONS)]
        settings = {"aggregation": AGGREGATIONS[number % len(AGGREGATIONS)], "correction": correction}
        cases.append(draw_case(random.Random(number), objective, settings, shapes(restarts=number % 3 > 0)))
    return cases


CASES = draw_cases()
CTPO, OTHERS = CASES[0], CASES[1:]
assert CTPO.objective["type"] == "ctpo"


# ---- what is compared


def assert_is_the_definition(case: Case, whole: Found) -> None:
    """A batch in one pack against the oracle."""
    wanted = (case.expected.loss, case.expected.token_loss, case.expected.gradient)
    for name, got, want in zip(("loss", "token_loss", "gradient"), whole, wanted, strict=False):
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"definition, {name}: {text}")


def assert_is_the_whole(case: Case, spread: Spread, found: Found, whole: Found) -> None:
    """A spread batch against the batch in one pack."""
    where = f"{spread}, {case.objective}, {case.settings}"
    bound = rounding(case, spread)
    for name, got, want in zip(("token_loss", "gradient"), found[1:3], whole[1:3], strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}, {where}: {text}")
    bound = (1e-12 if spread.dtype == "float64" else 1e-6) * max(1.0, whole.token_loss.abs().max().item())
    assert abs(found.loss - whole.loss) <= bound, f"loss, {where}: {found.loss} is not {whole.loss}"
    assert_same_stats(spread, found.stats, whole.stats, where)


def rounding(case: Case, spread: Spread) -> float:
    return 0


def assert_same_stats(spread: Spread, found: dict[str, Tensor], whole: dict[str, Tensor], where: str) -> None:
    assert found.keys() == whole.keys()
    for name, got in found.items():
        bound = 0.0 if not name.startswith("sum/") and spread.exact else (1e-9 if spread.dtype == "float64" else 1e-4)
        torch.testing.assert_close(got, whole[name], rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}, {where}: {text}")


# ---- the spreads


def on_ranks(info: RankInfo, cases: list[Case]) -> dict[str, Any]:
    """What each rank finds: in every spread of every case, and with each fault in those of one case."""
    ranks = Ranks(info, (2, 4))
    found: dict[str, Any] = {"spreads": [[ranks.shares(case, spread) for spread in SPREADS] for case in cases]}
    return found


def test_dev():
    import time, collections
    t0 = time.time()
    per_rank = run_ranks(RANKS, on_ranks, CASES)
    print("ranks", time.time() - t0)
    t0 = time.time()
    bad = collections.Counter()
    first = {}
    for i, case in enumerate(CASES):
        try:
            assert_is_the_definition(case, in_one_pack(case))
        except AssertionError as e:
            bad[("def", str(case.objective))] += 1
            first.setdefault(("def", str(case.objective)), str(e))
        for j, spread in enumerate(SPREADS):
            whole = in_one_pack(case, exact=spread.exact, dtype=spread.dtype)
            found = joined(case, spread, [r["spreads"][i][j] for r in per_rank])
            try:
                assert_is_the_whole(case, spread, found, whole)
            except AssertionError as e:
                key = (str(e)[:14], str(case.objective), spread.exact, spread.dtype)
                bad[key] += 1
                first.setdefault(key, str(e))
    print("compare", time.time() - t0)
    for k, n in bad.items():
        print(k, n, first[k])
