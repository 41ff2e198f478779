"""What to compute: an objective, an aggregation and a correction, checked once and resolved to functions and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from ctpo_megatron.algorithms.objectives import OBJECTIVES
from ctpo_megatron.algorithms.tokens import Method
from ctpo_megatron.config.objectives import Aggregation, Constant, Correction, Objective

_objective, _correction, _aggregation = TypeAdapter(Objective), TypeAdapter(Correction), TypeAdapter(Aggregation)


class Recipe(NamedTuple):
    """A loss, ready to be computed."""

    method: Method
    options: dict[str, Any]  # of the method
    anchor: str  # old or rollout
    aggregation: str
    constant: float  # tokens that the aggregation `constant` divides by
    correction: Correction | None


def make_recipe(
    objective: Mapping[str, Any] | Objective,
    aggregation: str | Mapping[str, Any] | Aggregation,
    correction: Mapping[str, Any] | Correction | None,
    *,
    has_rollout: bool,
) -> Recipe:
    """The recipe of these configs, or of mappings with their field names. `has_rollout`: whether rollout_logp will be given.

    Raises pydantic.ValidationError for what is not known, ValueError for what does not go together.
    """
    config = _objective.validate_python(objective)
    form = _aggregation.validate_python(aggregation)
    factors = None if correction is None else _correction.validate_python(correction)
    if not has_rollout and (config.anchor == "rollout" or factors is not None):
        raise ValueError(
            f"objective {config.type!r}, correction {factors!r}: needs rollout_logp, the sampling engine's log-probs"
        )
    if factors is not None and config.anchor == "rollout":
        raise ValueError(f"objective {config.type!r} takes its ratio against the rollout policy; a correction would count twice")
    constant = form.tokens if isinstance(form, Constant) else 1.0
    return Recipe(OBJECTIVES[config.type], config.model_dump(exclude={"type"}), config.anchor, form.type, constant, factors)
