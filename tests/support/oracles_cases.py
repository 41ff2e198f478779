"""Random batches for the comparison of `policy_loss` with the oracles, and the comparison itself."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ctpo_megatron.algorithms import LocalScan, Support, policy_loss
from tests.support.oracles import Row
from tests.support.oracles_batch import Expected, Options, expected_loss

Shape = list[tuple[bool, bool]]  # per token of a sequence: on the policy's side of the mask; first of a new policy version

TOP_K = 4
KNIFE_EDGE = 1e-9  # closer to a bound than this, rounding may decide which side a token is on
GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -3.0]
SCALES = [1e-4, 3e-3, 0.03, 0.3, 2.0]


def draw_shapes(rng: random.Random, *, restarts: bool) -> list[Shape]:
    """Up to five sequences: without a token, without a policy token, with tool tokens between, with new versions."""
    shapes = []
    for _ in range(rng.randint(1, 5)):
        length = 0 if rng.random() < 0.08 else rng.randint(1, 12)
        holes = rng.choice([0.0, 0.0, 0.3, 0.6, 1.0])
        renewals = rng.choice([0.0, 0.15, 0.4]) if restarts else 0.0
        shapes.append([(rng.random() >= holes, rng.random() < renewals) for _ in range(length)])
    return shapes


def draw_drifts(rng: random.Random, length: int) -> list[float]:
    """One scale for a sequence, from a barely moved policy to log ratios of 40, at single tokens or at all."""
    kind = rng.random()
    if kind < 0.12:
        return [rng.uniform(-40, 40) if rng.random() < 0.3 else rng.gauss(0, 0.3) for _ in range(length)]
    if kind < 0.2:
        return [rng.uniform(0, 40) for _ in range(length)]
    scale = rng.choice(SCALES)
    return [rng.gauss(0, scale) for _ in range(length)]


def draw_advantages(rng: random.Random, length: int) -> list[float]:
    """Zero, one value for the sequence, or one per token with zeros among them."""
    kind = rng.random()
    if kind < 0.1:
        return [0.0] * length
    if kind < 0.8:
        return [rng.gauss(0, 1.5)] * length
    return [0.0 if rng.random() < 0.15 else rng.gauss(0, 1.5) for _ in range(length)]


def draw_top(rng: random.Random, sampled: float, others: Sequence[float]) -> list[float]:
    """Log-probabilities of the sampled token and of shares of what it leaves; a share of 0 is an unused column."""
    left = 1 - math.exp(sampled)
    return [sampled, *(math.log(left * share) if left * share > 0 else -math.inf for share in others)]


def draw_row(rng: random.Random, shape: Shape) -> Row:
    row = Row([], [], [], draw_advantages(rng, len(shape)), [], [], [], [])
    scales = zip(shape, draw_drifts(rng, len(shape)), draw_drifts(rng, len(shape)), strict=True)
    for t, ((is_policy, restart), from_old, from_rollout) in enumerate(scales):
        logp = min(0.0, from_old, from_rollout) - rng.expovariate(1.0)
        shares = [rng.random() if rng.random() < 0.8 else 0.0 for _ in range(TOP_K)]
        moved = [share * math.exp(rng.gauss(0, min(abs(from_rollout), 0.5))) for share in shares]
        tops = [
            draw_top(rng, sampled, [share / (sum(of) + 1e-3) for share in of[1:]])
            for sampled, of in ((logp, moved), (logp - from_rollout, shares))
        ]
        values = [logp, logp - from_old, logp - from_rollout]
        if not is_policy:
            values = rng.choices(GARBAGE, k=3)
            tops = [rng.choices(GARBAGE, k=TOP_K), rng.choices(GARBAGE, k=TOP_K)]
            row.advantage[t] = rng.choice(GARBAGE)
        for stream, value in zip((row.logp, row.old_logp, row.rollout_logp), values, strict=True):
            stream.append(value)
        row.top_logp.append(tops[0])
        row.top_rollout.append(tops[1])
        row.mask.append(is_policy)
        row.restart.append(restart)
    return row


@dataclass(frozen=True)
class Case:
    objective: Options
    rows: list[Row]
    settings: dict[str, Any]  # aggregation, normalizer, groups, correction
    expected: Expected


def draw_case(rng: random.Random, objective: Options, settings: Options, shapes: Sequence[Shape] | None = None) -> Case:
    """A batch with what the oracle says of it; drawn again while any token is on a knife edge."""
    for _ in range(50):
        rows = [draw_row(rng, shape) for shape in (shapes or draw_shapes(rng, restarts=rng.random() < 0.4))]
        chosen = dict(settings)
        if chosen.get("aggregation") == "balanced":
            chosen["groups"] = [rng.choice([2, 3, 11]) for _ in rows]
        expected = expected_loss(objective, rows, **chosen)  # type: ignore[arg-type]
        if expected.decisions.margin > KNIFE_EDGE:
            return Case(objective, rows, chosen, expected)
    raise AssertionError("no batch off the knife edges in 50 draws")


def packed(rows: Sequence[Row], stream: str) -> torch.Tensor:
    """[tokens], or [tokens, K] for the tops; float64, or bool for the masks."""
    values = [value for row in rows for value in getattr(row, stream)]
    tensor = torch.tensor(values, dtype=torch.bool if stream in ("mask", "restart") else torch.float64)
    return tensor if values or not stream.startswith("top") else tensor.view(0, TOP_K)


def looks_at_top(objective: Options) -> bool:
    """Whether an objective takes both policies' top-k log-probs."""
    return any(str(objective.get(name, "")).startswith("topk") for name in ("divergence", "band"))


def run_policy_loss(
    objective: Options, rows: Sequence[Row], *, exact: bool = False, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, token losses, gradient) of the implementation."""
    logp = packed(rows, "logp").requires_grad_()
    restarts = packed(rows, "restart")
    lengths = torch.tensor([0, *(len(row.mask) for row in rows)])
    if settings.get("groups") is not None:
        settings["groups"] = torch.tensor(settings["groups"])
    needs_support = looks_at_top(objective)
    out = policy_loss(
        objective,
        logp=logp,
        old_logp=packed(rows, "old_logp"),
        rollout_logp=packed(rows, "rollout_logp"),
        advantages=packed(rows, "advantage"),
        mask=packed(rows, "mask"),
        cu_seqlens=lengths.cumsum(0).int(),
        restarts=restarts if restarts.any() else None,
        support=Support(packed(rows, "top_logp"), packed(rows, "top_rollout")) if needs_support else None,
        scan=LocalScan(exact=exact),
        **settings,
    )
    out.loss.backward()
    return out.loss.detach(), out.token_loss, logp.grad


def assert_as_expected(case: Case, *, exact: bool = False) -> None:
    tolerance = 1e-8 if exact else 1e-10
    actual = run_policy_loss(case.objective, case.rows, exact=exact, **case.settings)
    wanted = (case.expected.loss, case.expected.token_loss, case.expected.gradient)
    for name, got, want in zip(("loss", "token_loss", "gradient"), actual, wanted, strict=True):
        torch.testing.assert_close(
            got,
            torch.tensor(want, dtype=torch.float64),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}, exact={exact}, {text}\n{case}",
        )
