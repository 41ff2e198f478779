"""What the ranks of a replay saw: plain numbers that travel between processes, and how those of all ranks become one report.

Places are layout-free: a sequence's number in its rollout batch, and a token's position in it. So is the order of modules: by
layer, then as they finish within it. The same fault has the same first place at every layout, unless rounding moves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Order = tuple[int, int]  # layer (-1: before the first, the number of layers and more: after the last), place within it


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A token of the batch."""

    sequence: int  # number in the rollout batch
    position: int  # in the sequence, from 0
    padding: bool = False


@dataclass(frozen=True, slots=True)
class ModuleSeen:
    """What left a module, or the gradient that came back to it, over all micro-batches of one rank."""

    module: str  # megatron's name, with the layer's and the expert's number in the whole model
    order: Order
    largest: float  # of the finite absolute values; 0 of none
    nonfinite: int
    place: Place | None  # the first token whose values are not all finite; None where rows are not the batch's tokens
    rank: int


@dataclass(frozen=True, slots=True)
class TensorSeen:
    """A parameter's weights or gradient, or a rank's piece of it, under its Hugging Face name."""

    name: str
    number: int  # in the order of the model's tensors
    largest: float
    nonfinite: int
    rank: int


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss is made of at one token that the policy wrote."""

    place: Place
    policy_token: int  # among those that the policy wrote in the sequence, from 1
    input_id: int
    label_id: int
    logp: float
    anchor_logp: float
    rollout_logp: float
    log_ratio: float  # logp - anchor_logp
    log_ratio_sum: float  # of the sequence's tokens up to this one, each within +-20
    advantage: float
    weight: float  # of each token of the sequence in the loss
    loss: float  # before it is weighted
    gradient: float  # of the whole loss, by logp

    @property
    def first_bad(self) -> str | None:
        """The term that is not finite while those it is made of are."""
        names = ("advantage", "rollout_logp", "anchor_logp", "weight", "logp", "loss", "gradient")
        return next((name for name in names if not math.isfinite(getattr(self, name))), None)


@dataclass(frozen=True, slots=True)
class RankFindings:
    """What one rank saw. `loss`, `grad_norm` and statistics are the same on all."""

    loss: float
    grad_norm: float
    forward: list[ModuleSeen]
    backward: list[ModuleSeen]
    weights: list[TensorSeen]
    gradients: list[TensorSeen]
    tokens: list[TokenTerms]  # the first bad ones; the heaviest where none is bad
    bad_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class First:
    """The first module, in the order of a pass, whose values are not finite."""

    module: str
    layer: int
    ranks: list[int]  # where it was seen
    place: Place | None
    place_seen_in: str  # the module that showed it


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Largest finite absolute values of one layer over all ranks and tokens; `bad`: which of them had others."""

    layer: int
    attention: float
    mlp: float
    output: float
    gradient: float
    bad: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """What all ranks saw together."""

    loss: float
    grad_norm: float
    forward: First | None
    backward: First | None
    layers: list[LayerRow]
    weights: dict[str, list[int]]  # that are not finite -> ranks, in the model's order
    gradients: dict[str, list[int]]  # the same, in backward order
    largest_gradients: list[tuple[str, float]]
    tokens: list[TokenTerms]
    bad_tokens: int
    seconds: float
    worlds: int = field(default=1)

    @property
    def finite(self) -> bool:
        """Whether the step could have been applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and self.forward is None and not self.bad_tokens


def merge_findings(parts: Sequence[RankFindings], num_layers: int, tokens: int) -> Merged:
    """All ranks' findings as one. `tokens`: how many of them are told one by one."""
    bad = sum(part.bad_tokens for part in parts)
    terms = [each for part in parts for each in part.tokens if not bad or each.first_bad]
    terms.sort(key=(lambda t: t.place) if bad else (lambda t: -abs(t.loss * t.weight)))
    gradients = [each for part in parts for each in part.gradients]
    largest: dict[str, float] = {}
    for each in gradients:
        largest[each.name] = max(largest.get(each.name, 0.0), each.largest)
    return Merged(
        loss=parts[0].loss,
        grad_norm=parts[0].grad_norm,
        forward=_first([each for part in parts for each in part.forward], backward=False),
        backward=_first([each for part in parts for each in part.backward], backward=True),
        layers=[_row(layer, parts) for layer in range(num_layers)],
        weights=_names([each for part in parts for each in part.weights]),
        gradients=dict(reversed(_names(gradients).items())),
        largest_gradients=sorted(largest.items(), key=lambda item: -item[1])[:5],
        tokens=terms[:tokens],
        bad_tokens=bad,
        seconds=max(part.seconds for part in parts),
        worlds=len(parts),
    )


def _first(seen: Iterable[ModuleSeen], *, backward: bool) -> First | None:
    sign = -1 if backward else 1
    bad = sorted((each for each in seen if each.nonfinite), key=lambda each: (sign * each.order[0], sign * each.order[1]))
    if not bad:
        return None
    of_module = [each for each in bad if each.module == bad[0].module]
    # experts see their tokens in an order of their own: the next module that sees the batch's tells which they were
    placed = next((each.module for each in bad if each.place is not None), bad[0].module)
    places = [each.place for each in bad if each.module == placed and each.place is not None]
    ranks = sorted({each.rank for each in of_module})
    return First(bad[0].module, bad[0].order[0], ranks, min(places, default=None), placed)


def _names(seen: Iterable[TensorSeen]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for each in sorted((each for each in seen if each.nonfinite), key=lambda each: (each.number, each.rank)):
        found.setdefault(each.name, []).append(each.rank)
    return found


def _row(layer: int, parts: Sequence[RankFindings]) -> LayerRow:
    name = f"decoder.layers.{layer}"
    columns = {"attention": f"{name}.self_attention", "mlp": f"{name}.mlp", "output": name}
    forward = [each for part in parts for each in part.forward]
    backward = [each for part in parts for each in part.backward if each.module == name]
    seen = {column: [each for each in forward if each.module == module] for column, module in columns.items()}
    seen["gradient"] = backward
    largest = {column: max((each.largest for each in rows), default=0.0) for column, rows in seen.items()}
    return LayerRow(layer, **largest, bad=tuple(column for column, rows in seen.items() if any(each.nonfinite for each in rows)))
