"""What to compute: an objective, an aggregation and a correction, checked once and resolved to functions and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from ctpo_megatron.algorithms.objectives import OBJECTIVES
from ctpo_megatron.algorithms.tokens import Method
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.objectives import Aggregation, Constant, Correction, DelightConfig, Objective

_objective, _correction, _aggregation = TypeAdapter(Objective), TypeAdapter(Correction), TypeAdapter(Aggregation)


class Recipe(NamedTuple):
    """A loss, ready to be computed."""

    method: Method
    options: dict[str, Any]  # of the method
    anchor: str  # old or rollout
    aggregation: str
    constant: float  # tokens that the aggregation `constant` divides by
    correction: Correction | None
    delight: DelightConfig | None = None
    density: bool = True  # whether log-ratios are counted by their size and position: `algorithms.density`


def make_recipe(
    objective: Mapping[str, Any] | Objective,
    aggregation: str | Mapping[str, Any] | Aggregation,
    correction: Mapping[str, Any] | Correction | None,
    *,
    has_rollout: bool,
    delight: Mapping[str, Any] | DelightConfig | None = None,
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
    weight = None if delight is None else DelightConfig.model_validate(delight)
    options = config.model_dump(exclude={"type"})
    return Recipe(OBJECTIVES[config.type], options, config.anchor, form.type, constant, factors, weight)


def algorithm_recipe(algorithm: AlgorithmConfig, *, density: bool = False) -> Recipe:
    """The recipe of a training run, which has the engine's log-probs. `density`: see `Recipe`.

    Its sequences have their weights from the batch as a whole, so the aggregation is never asked.
    """
    recipe = make_recipe(
        algorithm.objective, algorithm.aggregation, algorithm.correction, has_rollout=True, delight=algorithm.delight
    )
    return recipe._replace(density=density)
