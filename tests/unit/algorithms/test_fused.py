"""The compiled pass against the oracles and against torch's form: losses, gradients, all statistics, and when it is taken.

It works in float32, so batches are rounded to float32 before the oracle reads them, and what is within 1e-3 of a bound is drawn
again. Tolerance: 1e-4 of a value against the oracles (their sums are not rounded), 2e-5 against torch; counts are equal.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctpo_megatron.algorithms import LocalScan, PolicyLoss, Seen, fused, make_recipe, policy_loss, raise_if_nonfinite, recipe_loss
from ctpo_megatron.algorithms.density import BUCKETS, FINEST, edges
from ctpo_megatron.algorithms.fused import JUDGES
from ctpo_megatron.algorithms.objectives import OBJECTIVES
from ctpo_megatron.errors import NonFiniteError
from ctpo_megatron.kernels.cpu import buckets, launch
from tests.support.often import often
from tests.support.oracles import Row
from tests.support.oracles_batch import Options, expected_loss
from tests.support.oracles_cases import draw_row, draw_shapes, packed
from tests.unit.algorithms.test_oracles import AGGREGATIONS, CORRECTIONS, ON_ROLLOUT, VARIANTS, name_of

FUSED = [
    v
    for v in VARIANTS
    if OBJECTIVES[str(v["type"])] in JUDGES
    and not str(v.get("divergence", "")).startswith("topk")
    and not v.get("adaptive_budget")
    and v.get("band", "position") == "position"
]
MARGIN = 1e-3  # closer to a bound than this, float32 may decide otherwise than float64


@pytest.fixture(scope="module", autouse=True)
def every_size() -> Iterator[None]:
    """The pass is taken for small batches, too; and a test that would not reach it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "FEWEST", 0)
        yield


def rounded(row: Row) -> Row:
    """The row as float32 holds it, also where a number there means infinity."""
    with np.errstate(all="ignore"):
        return Row(*(np.asarray(of, np.float32).tolist() if i < 4 else of for i, of in enumerate(dataclasses.astuple(row))))


def run(objective: Options, rows: list[Row], **chosen: Any) -> tuple[PolicyLoss, Tensor]:
    def stream(name: str) -> Tensor:
        return packed(rows, name).float()

    logp, restarts = stream("logp").requires_grad_(), packed(rows, "restart")
    if chosen.get("groups") is not None:
        chosen["groups"] = torch.tensor(chosen["groups"])
    out = policy_loss(
        objective,
        logp=logp,
        old_logp=stream("old_logp"),
        rollout_logp=stream("rollout_logp"),
        advantages=stream("advantage"),
        mask=packed(rows, "mask"),
        cu_seqlens=torch.tensor([0, *(len(row.mask) for row in rows)]).cumsum(0).int(),
        restarts=restarts if restarts.any() else None,
        **chosen,
    )
    out.loss.backward()
    assert logp.grad is not None
    return out, logp.grad


def compare(rng: random.Random, variant: Options, chosen: dict[str, Any], shapes: Any = None) -> None:
    """One batch off the bounds against its oracle; none where twenty draws are all near one."""
    for _ in range(20):
        rows = [rounded(draw_row(rng, shape)) for shape in (shapes or draw_shapes(rng, restarts=rng.random() < 0.4))]
        if chosen["aggregation"] == "balanced":
            chosen["groups"] = [rng.choice([2, 3, 11]) for _ in rows]
        expected = expected_loss(variant, rows, **chosen)
        if expected.decisions.margin > MARGIN:
            break
    else:
        return
    out, gradient = run(variant, rows, **chosen)
    for name, got, want in (("token_loss", out.token_loss, expected.token_loss), ("gradient", gradient, expected.gradient)):
        wanted = torch.tensor(want, dtype=torch.float32)
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}\n{rows}")
    scale = sum(abs(each) for each in expected.token_loss) + 1
    assert out.loss.item() == pytest.approx(expected.loss, abs=1e-4 * scale)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[launch.How]:
    """What the compiled pass was called with."""
    calls: list[launch.How] = []
    judge: Callable[..., launch.Found] = launch.judge

    def noted(how: launch.How, **given: Any) -> launch.Found:
        calls.append(how)
        return judge(how, **given)

    monkeypatch.setattr(launch, "judge", noted)
    return calls


@pytest.mark.thorough
@pytest.mark.parametrize("variant", FUSED, ids=name_of)
def test_an_objective_is_its_definition(variant: Options, taken: list[launch.How]) -> None:
    rng = random.Random(name_of(variant))
    for i in range(12):
        correction = None if variant["type"] in ON_ROLLOUT else CORRECTIONS[i % len(CORRECTIONS)]
        compare(rng, variant, {**AGGREGATIONS[i % len(AGGREGATIONS)], "correction": correction})
    assert len(taken) > 4


@settings(max_examples=often(60), deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12), min_size=1, max_size=6),
    variant=st.sampled_from(FUSED),
    chosen=st.sampled_from(AGGREGATIONS),
    correction=st.sampled_from(CORRECTIONS),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shapes: Any, variant: Options, chosen: Options, correction: Options | None, seed: int) -> None:
    correction = None if variant["type"] in ON_ROLLOUT else correction
    compare(random.Random(seed), variant, {**chosen, "correction": correction}, shapes)


def batch(tokens: int = 3000) -> dict[str, Any]:
    """Sequences of all lengths with an empty one, masks, restarts, and anything at masked tokens."""
    drawn = torch.Generator().manual_seed(5)
    lengths = torch.tensor([0, 1, 700, 0, 64, 1, tokens - 766])
    mask = torch.rand(tokens, generator=drawn) < 0.8
    old = -torch.rand(tokens, generator=drawn) * 3
    found = {
        "logp": old + 0.05 * torch.randn(tokens, generator=drawn),
        "old_logp": old,
        "rollout_logp": old + 0.05 * torch.randn(tokens, generator=drawn),
        "advantages": torch.tensor([1.0, 0.7, 1.3, 1.0, 0.0, 2.0, -0.6]).repeat_interleave(lengths),
    }
    hidden = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    for stream in found.values():
        stream[~mask] = hidden[torch.randint(0, 4, (int((~mask).sum()),), generator=drawn)]
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return found | {"mask": mask, "cu_seqlens": cu, "restarts": torch.rand(tokens, generator=drawn) < 0.005}


def both(variant: Options, given: dict[str, Any], **more: Any) -> tuple[list[PolicyLoss], list[Tensor]]:
    """By the pass, and by torch."""
    found, gradients = [], []
    for fewest in (0, 2**62):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "FEWEST", fewest)
            logp = given["logp"].clone().requires_grad_()
            found.append(policy_loss(variant, **{**given, "logp": logp}, groups=torch.arange(7) // 2, **more))
            found[-1].loss.backward()
            gradients.append(logp.grad)
    return found, gradients


@pytest.mark.parametrize("variant", FUSED, ids=name_of)
def test_it_says_what_torch_says(variant: Options, taken: list[launch.How]) -> None:
    corrected = variant["type"] not in ON_ROLLOUT
    for correction in (None, *({"type": "mask", "level": level} for level in ("prefix", "geometric") if corrected)):
        (ours, theirs), (gradient, expected) = both(variant, batch(), aggregation="balanced", correction=correction)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(ours.token_loss, theirs.token_loss, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=1e-8)
        for field in dataclasses.fields(ours.stats):
            mine, known = getattr(ours.stats, field.name), getattr(theirs.stats, field.name)
            assert mine.keys() == known.keys()
            for name, value in mine.items():
                torch.testing.assert_close(value, known[name], rtol=2e-5, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        clips = ("clip_high", "clip_low", "clip_dual", "clip_fraction")
        assert all(torch.equal(ours.stats.means[name].total, theirs.stats.means[name].total) for name in clips)
        assert torch.equal(ours.stats.sums["health/density"], theirs.stats.sums["health/density"])
    assert taken


def test_it_puts_nothing_into_buckets_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FEWEST", 0)
    counts = list[Tensor]()
    judge = launch.judge

    def noted(*args: Any, **more: Any) -> launch.Found:
        found = judge(*args, **more)
        counts.append(found.counts[launch.k.BY_BUCKET :])
        return found

    monkeypatch.setattr(launch, "judge", noted)
    recipe, given = make_recipe({"type": "ctpo"}, "token-mean", None, has_rollout=True), batch()
    asked, not_asked = (recipe_loss(recipe._replace(density=each), **given) for each in (True, False))
    assert torch.equal(asked.token_loss, not_asked.token_loss)
    assert asked.stats.sums.keys() - not_asked.stats.sums.keys() == {"health/density"}
    assert counts[0].sum() == 2 * given["mask"].sum()
    assert counts[1].sum() == 0


def test_threads_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shares", lambda bounds: [(0, 3), (3, 5), (5, 7)])
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(policy_loss({"type": "ctpo"}, **batch()))
    torch.set_num_threads(threads)
    assert torch.equal(found[0].token_loss, found[1].token_loss)
    assert torch.equal(found[0].stats.means["ratio"].total, found[1].stats.means["ratio"].total)
    monkeypatch.undo()
    alone = policy_loss({"type": "ctpo"}, **batch())
    assert torch.equal(alone.token_loss, found[0].token_loss)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_at_all(lengths: list[int]) -> None:
    empty = torch.empty(0)
    given = dict.fromkeys(("old_logp", "advantages"), empty) | {"mask": empty.bool(), "logp": torch.empty(0, requires_grad=True)}
    out = policy_loss({"type": "ctpo"}, **given, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    out.loss.backward()
    assert out.loss == 0
    raise_if_nonfinite(out.stats)


def test_the_first_number_that_is_not_finite_is_named() -> None:
    given = batch()
    own = given["mask"].nonzero().squeeze(1)
    sequence = torch.searchsorted(given["cu_seqlens"], own, right=True) - 1
    for stream, value in (("logp", torch.nan), ("rollout_logp", -torch.inf)):
        spoilt = {**given, stream: given[stream].clone()}
        spoilt[stream][own[[400, 900]]] = value
        named = int((sequence[:400] == sequence[400]).sum()) + 1
        found, _ = both({"type": "ctpo"}, spoilt, sequence_ids=torch.arange(7) * 10)
        for out in found:
            with pytest.raises(NonFiniteError, match=f"sequence {int(sequence[400]) * 10}, policy token {named} "):
                raise_if_nonfinite(out.stats)


def test_what_is_seen_is_what_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    given, seen = batch(), []
    recipe = make_recipe({"type": "ctpo", "dual_clip": 0.04}, "token-mean", None, has_rollout=True)
    for fewest in (0, 2**62):
        monkeypatch.setattr(fused, "FEWEST", fewest)
        into: list[Seen] = []
        recipe_loss(recipe, **{**given, "logp": given["logp"].clone().requires_grad_()}, seen=into)
        seen.append([torch.cat([getattr(each, name) for each in into])[given["mask"]] for name in Seen._fields])
    assert torch.equal(seen[0][1], seen[1][1])
    assert set(seen[0][1].unique().tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-3, atol=1e-6)


REFUSED: dict[str, dict[str, Any]] = {
    "few tokens": {"few": True},
    "float64": {"dtype": torch.float64},
    "sums that are not exact": {"scan": LocalScan(exact=False)},
    "an adaptive budget": {"objective": {"type": "cppo", "adaptive_budget": True}},
    "a measured band": {"objective": {"type": "ctpo", "band": "variance"}},
    "an objective without a judge": {"objective": {"type": "reinforce"}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_left_to_torch(case: str, taken: list[launch.How], monkeypatch: pytest.MonkeyPatch) -> None:
    told = dict(REFUSED[case])
    if told.pop("few", False):
        monkeypatch.setattr(fused, "FEWEST", 3001)
    dtype = told.pop("dtype", torch.float32)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch().items()}
    policy_loss(told.pop("objective", {"type": "ctpo"}), **{**given, "logp": given["logp"].requires_grad_()}, **told)
    assert not taken


def test_buckets_are_those_of_the_logarithm() -> None:
    look = buckets.lookup([(tuple(edges(finest)), finest) for finest in FINEST])
    values = np.concatenate([np.linspace(-25, 25, 4001), np.geomspace(1e-6, 1e3, 2001), [0.0, np.nan, np.inf]])
    for which, finest in enumerate(FINEST):
        with np.errstate(over="ignore"):
            place = (np.arcsinh(np.nan_to_num(values, nan=-np.inf) / finest) / 7.0 + 1) * (BUCKETS / 2)
        expected = np.nan_to_num(place).clip(0, BUCKETS - 1).astype(int)
        found = [buckets.bucket_of(value, which, look) + (BUCKETS - 1) // 2 for value in values]
        assert found == expected.tolist()
