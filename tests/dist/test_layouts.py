"""The same loss however a batch is spread: over packs, micro-batches, data-parallel replicas and context-parallel ranks.

One pack on one rank is held against the definitions (the oracles of the unit tests), every other spread against that pack:
token losses and gradients to the last bit where sums are exact (`rounding` says where they are not), the loss to 1e-12, in
float32 to 1e-6. Faults that are planted on purpose must make these comparisons fail.
"""

from __future__ import annotations

import collections
import functools
import math
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from ctpo_megatron.algorithms import objectives, raise_if_nonfinite
from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.mcore.rank import RankInfo
from tests.support.faults import ACROSS_RANKS, EVERYWHERE
from tests.support.oracles_batch import Options
from tests.support.oracles_cases import Case, Shape, draw_case
from tests.support.ranks import run_ranks
from tests.support.spread import Found, Ranks, Spread, in_one_pack, joined

pytestmark = pytest.mark.dist

Results = dict[str, Any]  # of a rank
Wholes = Callable[[int, Spread], Found]  # (number of a case, how it is spread) -> the same in one pack
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
    {"type": "drpo", "epsilon": 0.1},
    {"type": "kpop", "gate": "prefix_max", "delta": 0.5},
    {"type": "kpop", "gate": "prefix_sum", "delta": 0.5, "penalty": 0.1},
    {"type": "reinforce"},
    {"type": "ctpo", "band": "variance"},
    {"type": "ctpo", "band": "topk_entropy", "band_unit": 0.3},
]
AGGREGATIONS = ("balanced", "sequence-mean", "token-mean", {"type": "constant", "tokens": 64}, "sequence-sum")
CORRECTIONS: list[Options | None] = [
    None,
    {"type": "truncate", "level": "prefix", "low": 0.3, "high": 2.0},
    {"type": "mask", "level": "sequence", "low": 0.05, "high": 20.0},
    {"type": "truncate", "level": "geometric", "low": 0.3, "high": 2.0},
    {"type": "icepop", "low": 0.1, "high": 3.0},
]
ON_ROLLOUT = ("dppo", "cppo", "trm", "drpo", "kpop")  # take no correction

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
        settings |= {"delight": {"eta": 0.5}} if number % 5 == 4 else {}
        cases.append(draw_case(random.Random(number), objective, settings, shapes(restarts=number % 3 > 0)))
    return cases


def draw_broken() -> Case:
    """The fourth policy token of the third sequence with one has no log-prob."""
    case = draw_case(random.Random(0), {"type": "ctpo"}, {"aggregation": "token-mean", "correction": None}, shapes(restarts=True))
    row = case.rows[3]
    row.logp[row.policy_tokens()[3]] = math.nan
    return case


CASES, BROKEN = draw_cases(), draw_broken()
NAMES = ["-".join(str(value) for value in objective.values()) for objective in OBJECTIVES]
BROKEN_SPREADS = [Spread(cp, layout, n, 2) for (cp, layout), n in product(CUTS, (1, 3))]
FAULT_SPREADS = [Spread(cp, layout) for cp, layout in CUTS if cp > 1]


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
    rounded = 1e-12 if spread.dtype == "float64" else 1e-6
    for kind in ("sums", "means", "maxima", "minima"):
        got, want = getattr(found.stats, kind), getattr(whole.stats, kind)
        assert got.keys() == want.keys()
        bound = rounded if kind in ("sums", "means") or not spread.exact else 0.0
        for name in want:
            message = functools.partial("{}, {}: {}".format, name, where)
            torch.testing.assert_close(got[name], want[name], rtol=bound, atol=bound, msg=message)


def rounding(case: Case, spread: Spread) -> float:
    """How far a token's loss and gradient may be off, absolutely and relatively; 0: not by one bit.

    Exact sums, minima and maxima are the same bits everywhere, and so is all that is computed from them token by token, with
    one exception: torch's sigmoid (SAPO) rounds differently in the last elements of a tensor, which are not vectorised. CPPO's
    position-weighted sum is float64 also in exact mode, but only decides which tokens are kept.
    """
    if case.objective["type"] == "sapo" or case.settings.get("delight") is not None:
        return 4 * torch.finfo(getattr(torch, spread.dtype)).eps
    if str(case.objective.get("band", "")).endswith("variance"):  # a sum of squares is float64 also in exact mode
        return max(1e-12, 4 * torch.finfo(getattr(torch, spread.dtype)).eps)
    return 0.0 if spread.exact else 1e-12


# ---- the ranks


def on_ranks(info: RankInfo, cases: list[Case], broken: Case) -> Results:
    """What each rank finds: in every spread of every case, in some spreads with each fault, and with a broken log-prob."""
    ranks = Ranks(info, (2, 4))
    found: Results = {
        "cases": [[ranks.shares(case, spread) for spread in spreads_of(number)] for number, case in enumerate(cases)],
        "broken": [ranks.shares(broken, spread) for spread in BROKEN_SPREADS],
        "faults": {},
    }
    for name, fault in ACROSS_RANKS.items():
        with fault():
            found["faults"][name] = [ranks.shares(cases[0], spread) for spread in FAULT_SPREADS]
    return found


@pytest.fixture(scope="module")
def per_rank() -> list[Results]:
    return run_ranks(RANKS, on_ranks, CASES, BROKEN)


@pytest.fixture(scope="module")
def wholes() -> Wholes:
    """The batch of a case in one pack, in the numbers that a spread uses."""

    @functools.cache
    def whole(number: int, exact: bool, dtype: str) -> Found:
        return in_one_pack(CASES[number], exact=exact, dtype=dtype)

    return lambda number, spread: whole(number, spread.exact, spread.dtype)


# ---- the tests


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_one_pack_is_the_definition(wholes: Wholes, number: int) -> None:
    assert_is_the_definition(CASES[number], wholes(number, Spread()))


@pytest.mark.parametrize("number", range(len(CASES)), ids=NAMES)
def test_every_spread_is_one_pack(per_rank: list[Results], wholes: Wholes, number: int) -> None:
    case = CASES[number]
    for place, spread in enumerate(spreads_of(number)):
        found = joined(case, spread, [rank["cases"][number][place] for rank in per_rank])
        assert_is_the_whole(case, spread, found, wholes(number, spread))


def test_every_cut_meets_every_order_and_number_of_micro_batches() -> None:
    assert {objective["type"] for objective in OBJECTIVES} == set(objectives.OBJECTIVES)
    met = {(s.cp, s.layout, s.micro_batches, s.order) for number in range(len(CASES)) for s in spreads_of(number)}
    assert met >= {(*cut, n, order) for cut, n, order in product(CUTS, (1, 2, 3), range(3))}
    balanced = [case.settings["groups"] for case in CASES if "groups" in case.settings]
    packs = Spread(micro_batches=2).packs(len(SEQUENCES))
    assert all(any({groups[i] for i in packs[0]} & {groups[i] for i in packs[1]}) for groups in balanced)


def test_ranks_without_a_policy_token_take_part(per_rank: list[Results]) -> None:
    """Their share is zero, and it has a gradient: zeros, not None."""
    met = collections.Counter()
    for number in range(len(CASES)):
        for place, spread in enumerate(spreads_of(number)):
            for share in (share for rank in per_rank for share in rank["cases"][number][place].values()):
                if share["policy_tokens"] == 0:
                    met[spread.cp, spread.layout] += 1
                    assert share["share"] == 0
                    assert share["gradient"].shape == share["token_loss"].shape
                    assert not share["gradient"].any()
    assert set(met) == set(CUTS)


def test_a_broken_log_prob_is_found_at_its_place(per_rank: list[Results]) -> None:
    for place, spread in enumerate(BROKEN_SPREADS):
        stats = joined(BROKEN, spread, [rank["broken"][place] for rank in per_rank]).stats
        with pytest.raises(NonFiniteError, match=r"sequence 3, policy token 4 \("):
            raise_if_nonfinite(stats)


@pytest.mark.parametrize("fault", EVERYWHERE)
def test_a_fault_in_what_is_scanned_is_found(fault: str) -> None:
    """By the definition alone: the fault is the same in every spread."""
    assert_is_the_definition(CASES[0], in_one_pack(CASES[0]))
    with EVERYWHERE[fault](), pytest.raises(AssertionError, match="definition, "):
        assert_is_the_definition(CASES[0], in_one_pack(CASES[0]))


@pytest.mark.parametrize("place", range(len(FAULT_SPREADS)), ids=[f"{s.cp}-{s.layout}" for s in FAULT_SPREADS])
@pytest.mark.parametrize("fault", ACROSS_RANKS)
def test_a_fault_across_ranks_is_found(per_rank: list[Results], fault: str, place: int) -> None:
    """By comparison with one pack, which the fault leaves as it is."""
    case, spread = CASES[0], FAULT_SPREADS[place]
    with ACROSS_RANKS[fault]():
        whole = in_one_pack(case)
        assert_is_the_definition(case, whole)
        found = joined(case, spread, [rank["faults"][fault][place] for rank in per_rank])
        with pytest.raises(AssertionError):
            assert_is_the_whole(case, spread, found, whole)
