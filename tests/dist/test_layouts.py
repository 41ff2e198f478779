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


def spreads_of(number: int) -> list[Spread]:
    """The spreads that the objective of this number is tried in; orders and micro-batches meet in changing pairs."""
    spreads = [Spread(cp, layout, n, (n + number) % 3) for (cp, layout), n in product(CUTS, (1, 2, 3))]
    spreads += [Spread(cp, layout, 2, number % 3, dtype="float32") for cp, layout in CUTS]
    spreads += [Spread(cp, layout, 1, number % 3, exact=False) for cp, layout in CUTS[number % 2 :: 2]]
    spreads += [Spread(1, "zigzag", 1, number % 3, part=5), Spread(2, "zigzag", 1, number % 3, part=5)]
    if number % 4 == 0:  # every sequence alone: packs without a token, ranks without a policy token
        spreads += [Spread(cp, layout, len(SEQUENCES), 0) for cp, layout in CUTS]
    return spreads


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
    where, bound = f"{spread}, {case.objective}, {case.settings}", rounding(case, spread)
    for name, got, want in zip(("token_loss", "gradient"), found[1:3], whole[1:3], strict=True):
        torch.testing.assert_close(got, want, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}, {where}: {text}")
    bound = (1e-12 if spread.dtype == "float64" else 1e-6) * max(1.0, whole.token_loss.abs().max().item())
    assert abs(found.loss - whole.loss) <= bound, f"loss, {where}: {found.loss} is not {whole.loss}"
    assert found.stats.keys() == whole.stats.keys()
    for name, got in found.stats.items():
        bound = 1e-12 if spread.dtype == "float64" else 1e-6
        bound = bound if name.startswith("sum/") or not spread.exact else 0.0
        torch.testing.assert_close(got, whole.stats[name], rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}, {where}: {text}")


def rounding(case: Case, spread: Spread) -> float:
    """How far a token's loss and gradient may be off, absolutely and relatively; 0: not by one bit.

    Exact sums, minima and maxima are the same bits everywhere, and so is all that is computed from them token by token, with
    one exception: torch's sigmoid (SAPO) rounds differently in the last elements of a tensor, which are not vectorised. CPPO's
    position-weighted sum is float64 also in exact mode, but only decides which tokens are kept.
    """
    if case.objective["type"] == "sapo":
        return 4 * torch.finfo(getattr(torch, spread.dtype)).eps
    return 0.0 if spread.exact else 1e-12


# ---- the ranks


def on_ranks(info: RankInfo, cases: list[Case], broken: Case) -> dict[str, Any]:
    """What each rank finds: in every spread of every case, in some spreads with each fault, and with a broken log-prob."""
    ranks = Ranks(info, (2, 4))
    found: dict[str, Any] = {
        "cases": [[ranks.shares(case, spread) for spread in spreads_of(number)] for number, case in enumerate(cases)],
        "broken": [ranks.shares(broken, spread) for spread in BROKEN_SPREADS],
        "faults": {},
    }
    for name, fault in ACROSS_RANKS.items():
        with fault():
            found["faults"][name] = [ranks.shares(cases[0], spread) for spread in FAULT_SPREADS]
    return found


@pytest.fixture(scope="module")
def per_rank() -> list[dict[str, Any]]:
    return run_ranks(RANKS, on_ranks, CASES, BROKEN)


@pytest.fixture(scope="module")
def wholes() -> Callable[[int, Spread], Found]:
    """The batch of a case in one pack, in the numbers that a spread uses."""

    @functools.cache
    def whole(number: int, exact: bool, dtype: str) -> Found:
        return in_one_pack(CASES[number], exact=exact, dtype=dtype)

    return lambda number, spread=Spread(): whole(number, spread.exact, spread.dtype)


# ---- the tests


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_one_pack_is_the_definition(wholes, number):
    assert_is_the_definition(CASES[number], wholes(number))


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_every_spread_is_one_pack(per_rank, wholes, number):
    case = CASES[number]
    for place, spread in enumerate(spreads_of(number)):
        found = joined(case, spread, [rank["cases"][number][place] for rank in per_rank])
        assert_is_the_whole(case, spread, found, wholes(number, spread))


def test_every_objective_meets_every_cut_order_and_number_of_micro_batches():
    assert {objective["type"] for objective in OBJECTIVES} == set(ALL_OBJECTIVES)
    met = {(s.cp, s.layout, s.micro_batches, s.order) for number in range(len(CASES)) for s in spreads_of(number)}
    assert met >= {(*cut, n, order) for cut, n, order in product(CUTS, (1, 2, 3), range(3))}
    groups, weights = (next(c.settings["groups"] for c in CASES if "groups" in c.settings)), (1, 2, 3)
    assert any(len({m for m, pack in enumerate(Spread(micro_batches=n).packs(len(groups))) for i in pack if groups[i] == g}) > 1
               for n in weights for g in groups)


def test_ranks_without_a_policy_token_take_part(per_rank):
    """Their share is zero, and it has a gradient: zeros, not None."""
    met = collections.Counter()
    for number, place in product(range(len(CASES)), range(100)):
        spreads = spreads_of(number)
        if place >= len(spreads):
            continue
        for rank in per_rank:
            for share in rank["cases"][number][place].values():
                if share["policy_tokens"] == 0:
                    met[spreads[place].cp, spreads[place].layout] += 1
                    assert share["share"] == 0
                    assert share["gradient"].shape == share["token_loss"].shape
                    assert not share["gradient"].any()
    assert set(met) == set(CUTS)
