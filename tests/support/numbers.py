"""Values of a step as plain numbers, to be compared one by one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.record.values import Max, Mean, Min, Number, Sum, Value, Values


def flat(values: Mapping[str, Value]) -> dict[str, float]:
    """Sums of means and sums, extremes as they are; entry i of a vector x is `x/i`, and the weight of a mean `x weight`."""
    rows = {name: value.total if isinstance(value, Sum | Mean) else value.value for name, value in values.items()}
    rows |= {f"{name} weight": value.weight for name, value in values.items() if isinstance(value, Mean)}
    found: dict[str, float] = {}
    for name, row in rows.items():
        found |= {f"{name}/{i}": float(x) for i, x in enumerate(row)} if isinstance(row, np.ndarray) else {name: float(row)}
    return found


def on_host(stats: Stats) -> Values:
    """What the trainer makes of the statistics of a single micro-batch on a single rank."""

    def number(tensor: Tensor) -> Number:
        return tensor.double().numpy() if tensor.dim() else tensor.item()

    values: Values = {name: Sum(number(tensor)) for name, tensor in stats.sums.items()}
    values |= {name: Mean(number(mean.total), number(mean.weight)) for name, mean in stats.means.items()}
    values |= {name: Max(number(tensor)) for name, tensor in stats.maxima.items()}
    return values | {name: Min(number(tensor)) for name, tensor in stats.minima.items()}
