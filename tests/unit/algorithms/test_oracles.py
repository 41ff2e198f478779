"""`policy_loss` against the oracles: value, token losses and gradient of every objective, option, aggregation and correction.

Batches are random: packed sequences with tool tokens, without policy tokens, without any token; drifts up to +-40; advantages of
both signs and zero; new policy versions; NaN and infinities at masked tokens. They keep off the knife edges (a value within 1e-9
of a bound), where rounding and not the definition decides; a ratio of exactly 1 is in `test_identities.py`.
"""

from __future__ import annotations

import random
from itertools import product
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.often import often
from tests.support.oracles import OBJECTIVES, Row, divergence_of
from tests.support.oracles_batch import RANGES, Options, expected_loss
from tests.support.oracles_cases import Case, assert_as_expected, draw_case, run_policy_loss

AGGREGATIONS: list[Options] = [
    {"aggregation": aggregation, "normalizer": normalizer}
    for normalizer in (None, 3.7)
    for aggregation in ("token-mean", "sequence-mean", "sequence-sum", "balanced", {"type": "constant", "tokens": 64})
]
LEVELS = ("token", "prefix", "sequence", "geometric")
CORRECTIONS: list[Options | None] = [
    None,
    *({"type": "truncate", "level": level, "low": 0.3, "high": 2.0} for level in LEVELS),
    *({"type": "mask", "level": level, "low": 0.5, "high": 2.0} for level in LEVELS),
    *({"type": "truncate", "level": level, "low": 0.0, "high": 1e9} for level in ("prefix", "sequence")),  # above exp(20)
    {"type": "icepop", "low": 0.1, "high": 1.5},
    *({"type": kind} for kind in RANGES),  # with its own range, at token level
]
ON_ROLLOUT = ("dppo", "cppo", "trm", "drpo", "kpop")  # take no correction
BANDS = ("variance", "entropy", "topk_variance", "topk_entropy")
DELIGHTS: list[Options] = [{}, {"eta": 0.3, "max_surprisal": 0.7}, {"centred": True}]
DIVERGENCES = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
VARIANTS: list[Options] = [
    *(
        {"type": "ctpo", "ratio": ratio, "power": power, "dual_clip": dual}
        for ratio, power, dual in product(("cumulative", "geomean"), (-0.5, 0.0, 0.5, 1.0), (0.05, None))
    ),
    {"type": "ctpo"},
    {"type": "ctpo", "clip_low": 0.693, "clip_high": 1.609, "dual_clip": 1.609, "power": 0.0},  # a fixed window
    {"type": "ctpo", "clip_low": 0.03, "clip_high": 0.08, "dual_clip": 0.5},
    {"type": "grpo"},
    {"type": "grpo", "dual_clip": None},
    {"type": "grpo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 2.0},
    {"type": "gspo"},
    {"type": "gspo", "clip_low": 0.05, "clip_high": 0.02},
    {"type": "sequence"},
    {"type": "sequence", "clip_low": 0.5, "clip_high": 4.0},
    {"type": "sapo"},
    {"type": "sapo", "tau_positive": 2.0, "tau_negative": 0.5},
    {"type": "cispo"},
    {"type": "cispo", "clip_low": 0.3, "clip_high": 4.0},
    {"type": "gmpo"},
    {"type": "gmpo", "clip_low": 0.1, "clip_high": 0.2},
    *({"type": "minpro", "form": form} for form in ("weight", "ppo")),
    {"type": "minpro", "form": "ppo", "clip_low": 0.5, "clip_high": 0.1},
    *({"type": "dppo", "divergence": divergence} for divergence in DIVERGENCES),
    *({"type": "dppo", "divergence": divergence, "delta": 0.05, "ratio_cap": None} for divergence in DIVERGENCES),
    *(
        {"type": "cppo", "divergence": divergence, "adaptive_budget": adaptive}
        for divergence, adaptive in product(DIVERGENCES, (False, True))
    ),
    {"type": "cppo", "delta": 0.2, "budget": 0.002, "weight_min": 0.3},
    *({"type": "trm", "divergence": divergence} for divergence in ("k2", "k3", *DIVERGENCES)),
    *(
        {"type": "trm", "divergence": divergence, "max_divergence": 0.05, "mean_divergence": mean}
        for divergence, mean in product(("k2", "k3", *DIVERGENCES), (None, 0.02))
    ),
    {"type": "trm", "divergence": "k3", "mean_divergence": 25.0},  # above what a log-ratio may be
    *({"type": "ctpo", "band": band, "band_unit": unit} for band, unit in product(BANDS, (None, 0.3))),
    {"type": "ctpo", "band": "variance", "band_unit": 0.3, "ratio": "geomean", "power": 1.0, "clip_low": 0.3, "clip_high": 0.4},
    {"type": "cppo", "adaptive_budget": True, "adaptive_max": 5.0, "adaptive_quantile": 0.5, "adaptive_factor": 2.0},
    {"type": "drpo"},
    {"type": "drpo", "epsilon": 0.1},
    *(
        {"type": "kpop", "gate": gate, "delta": delta}
        for gate, delta in product(("token", "prefix_max", "prefix_sum"), (0.05, 0.5))
    ),
    {"type": "kpop", "penalty": 0.1},
    {"type": "reinforce"},
]


def name_of(variant: Options) -> str:
    return "-".join(str(value) for value in variant.values())


def generator(variant: Options) -> random.Random:
    return random.Random(crc32(name_of(variant).encode()))


def cases_of(variant: Options, count: int) -> list[Case]:
    """Every aggregation and, where allowed, every correction, in changing pairs."""
    rng = generator(variant)
    cases = []
    for i in range(count):
        correction = None if variant["type"] in ON_ROLLOUT else CORRECTIONS[i % len(CORRECTIONS)]
        chosen = {**AGGREGATIONS[i % len(AGGREGATIONS)], "correction": correction}
        cases.append(draw_case(rng, variant, chosen))
    return cases


def test_the_oracle_itself_agrees_with_the_authors() -> None:
    """Numbers that the authors' implementation of CTPO gave: one sequence, clipped below at one token, dual-clipped at two."""
    mask = [True] * 3 + [False] * 2 + [True] * 4 + [False]
    logp = [-0.10, -0.50, -1.20, -9.0, -3.0, -0.02, -2.00, -0.70, -0.30, -7.0]
    old = [-0.12, -0.47, -1.35, -1.0, -5.0, -0.05, -1.80, -0.78, -0.10, -2.0]
    row = Row(logp, old, old, [-0.75] * 10, mask, [False] * 10, [], [])
    found = expected_loss({"type": "ctpo"}, [row], aggregation="token-mean")
    assert found.loss == pytest.approx(0.7675283758651056, rel=1e-14)
    slopes = [0.10930728643143811, 0.10607676790169657, 0, 0, 0, 0, 0.10397630716591161, 0.11263618889743117, 0, 0]
    assert found.gradient == pytest.approx(slopes, rel=1e-14)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_an_objective_is_its_definition_at_a_glance(variant: Options) -> None:
    for case in cases_of(variant, 2):
        assert_as_expected(case)


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_an_objective_is_its_definition(variant: Options) -> None:
    cases = cases_of(variant, 30)
    for case in cases:
        assert_as_expected(case)
        assert_as_expected(case, exact=True)
    # the batches were worth it: every bound of the definition was met from both sides
    taken = set.union(*(case.expected.decisions.taken for case in cases))
    assert [name for name, way in sorted(taken) if (name, not way) not in taken] == []
    assert sum(any(case.expected.gradient) for case in cases) >= 5


@pytest.mark.parametrize("kind", ["k2", "k3", *DIVERGENCES])
def test_a_divergence_has_its_value(kind: str) -> None:
    """Bracketed by TRM's bound on a single token."""
    rng = random.Random(3)
    for _ in range(25):
        case = draw_case(rng, {"type": "trm", "divergence": kind}, {}, [[(True, False)]])
        case.rows[0].advantage[0] = 1.0
        value = divergence_of(case.rows[0], 0, kind)
        for bound, kept in ((value * (1 + 1e-9) + 1e-12, True), (value * (1 - 1e-9) - 1e-12, False)):
            objective = {**case.objective, "max_divergence": bound, "mean_divergence": None}
            if bound > 0:
                assert (run_policy_loss(objective, case.rows)[1] != 0).item() == kept, (value, case)


@pytest.mark.thorough
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_budget_that_binds_over_long_prefixes(divergence: str, adaptive: bool) -> None:
    """Budgets of the size of usual divergences: whether a token is kept hangs on every weight and share before it."""
    rng = random.Random(4)
    for budget in (0.01, 0.03, 0.06, 0.1) * 4:
        variant = {"type": "cppo", "divergence": divergence, "delta": 2 * budget, "budget": budget, "weight_min": 0.1}
        shapes = [[(True, False)] * 6 + [(True, rng.random() < 0.5)] + [(True, False)] * 8] * 16
        case = draw_case(rng, {**variant, "adaptive_budget": adaptive}, {"aggregation": "token-mean"}, shapes)
        assert_as_expected(case)
        assert_as_expected(case, exact=True)


@pytest.mark.thorough
@pytest.mark.parametrize("variant", [{"type": "ctpo"}, {"type": "grpo"}], ids=name_of)
def test_every_aggregation_with_every_correction(variant: Options) -> None:
    rng = generator(variant)
    for chosen, correction in product(AGGREGATIONS, CORRECTIONS):
        assert_as_expected(draw_case(rng, variant, {**chosen, "correction": correction}))


@pytest.mark.parametrize("delight", DELIGHTS, ids=str)
def test_delight_weighs_any_objective(delight: Options) -> None:
    for number, name in enumerate(OBJECTIVES):
        rng = random.Random(number)
        correction = None if name in ON_ROLLOUT else CORRECTIONS[number % len(CORRECTIONS)]
        settings = {**AGGREGATIONS[number % len(AGGREGATIONS)], "correction": correction, "delight": delight}
        assert_as_expected(draw_case(rng, {"type": name}, settings))


SHAPES = st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), min_size=1, max_size=6)


@settings(max_examples=often(100), deadline=None, derandomize=True)
@given(
    shapes=SHAPES,
    variant=st.sampled_from(VARIANTS),
    chosen=st.sampled_from(AGGREGATIONS),
    correction=st.sampled_from(CORRECTIONS),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shapes: list, variant: Options, chosen: Options, correction: Options | None, seed: int) -> None:
    correction = None if variant["type"] in ON_ROLLOUT else correction
    case = draw_case(random.Random(seed), variant, {**chosen, "correction": correction}, shapes)
    assert_as_expected(case)
    assert_as_expected(case, exact=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_a_batch_without_a_policy_token_weighs_nothing(variant: Options) -> None:
    shapes = [[(False, False)] * 3, [], [(False, True)] * 2]
    for chosen in AGGREGATIONS:
        case = draw_case(generator(variant), variant, {**chosen, "correction": None}, shapes)
        loss, token_loss, gradient = run_policy_loss(variant, case.rows, **case.settings)
        assert loss == 0
        assert torch.equal(token_loss, torch.zeros(5, dtype=torch.float64))
        assert torch.equal(gradient, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("name", ON_ROLLOUT)
def test_objectives_on_the_rollout_policy_take_no_correction(name: str) -> None:
    case = draw_case(random.Random(0), {"type": name}, {"aggregation": "token-mean"}, [[(True, False)] * 3])
    with pytest.raises(ValueError, match="rollout policy"):
        run_policy_loss(case.objective, case.rows, correction={"type": "icepop"})
