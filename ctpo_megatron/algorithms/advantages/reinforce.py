"""REINFORCE++ (arXiv 2501.03262): discounted returns, whitened over the rollout batch.

Of the paper's reward only the outcome is here. Its KL term is not part of the reward: a reference policy, where there is one, is
penalised in the loss (`algorithms/reference.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.algorithms.advantages.group import EPS


def outcome_returns(reward: float, tokens: int, gamma: float) -> NDArray[np.float64]:
    """Returns [tokens] where the only reward comes with the last token: G_t = gamma**(tokens - 1 - t) * reward.

    `tokens` counts what the policy wrote, so a return passes through tool output undiscounted.
    """
    return reward * gamma ** np.arange(tokens - 1, -1, -1, dtype=np.float64)


def whiten(sequences: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """All values of the ragged `sequences` minus their common mean, divided by their standard deviation + 1e-6.

    The standard deviation is that of the population. Equal values, and one alone, become 0 up to rounding.
    """
    values = np.concatenate([np.empty(0), *sequences])
    if values.size:
        values = (values - values.mean()) / (values.std() + EPS)
    bounds = list(accumulate(map(len, sequences), initial=0))
    return [values[first:last] for first, last in pairwise(bounds)]
