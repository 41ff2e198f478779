"""Mistakes that are easily made, each planted by replacing one function. The tests that run with one must fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ctpo_megatron.algorithms import prepare
from ctpo_megatron.algorithms.objectives import OBJECTIVES, ctpo
from ctpo_megatron.algorithms.scan import Channel, Joined
from ctpo_megatron.algorithms.tokens import Given, TokenLoss, Tokens
from ctpo_megatron.parallel import context
from tests.support import spread

Fault = Callable[[], AbstractContextManager[Any]]
_channels, _carry, _shift, _piece_places = (
    prepare.channels,
    context.ContextParallelScan.carry,
    context.shift,
    context.piece_places,
)


# ---- in what is scanned, wherever it is


def position_off_by_one(given: Given, statistics: Any, restarts: Tensor | None) -> dict[str, Channel]:
    """The first policy token of a sequence is its 0th."""
    channels = _channels(given, statistics, restarts)
    return channels | {"/position": channels["/position"]._replace(reach="before")}


def tool_tokens_counted(given: Given, statistics: Any, restarts: Tensor | None) -> dict[str, Channel]:
    """Positions and lengths are those of all tokens."""
    return _channels(given._replace(mask=torch.ones_like(given.mask)), statistics, restarts)


def reset_at_every_turn(given: Given, statistics: Any, restarts: Tensor | None) -> dict[str, Channel]:
    """What looks back begins anew after a tool's tokens."""
    after_tool = given.mask & ~torch.nn.functional.pad(given.mask, (1, 0))[:-1]
    return _channels(given, statistics, after_tool if restarts is None else after_tool | restarts)


def gradient_through_the_prefix(tokens: Tokens, **options: Any) -> TokenLoss:
    """Each token's loss reaches the log-probs of all policy tokens before it. For parts that hold whole sequences."""
    run = (tokens.mask & (tokens.position == 1)).cumsum(0)
    reached = (run == run.unsqueeze(1)).tril() & tokens.mask
    prefix = (reached * tokens.log_ratio).sum(1)
    with patch.object(ctpo, "carry_gradient", lambda value, logp: value + (prefix - prefix.detach())):
        return ctpo.loss(tokens, **options)


# ---- in what goes over ranks


def pieces_reversed(layout: context.Layout, cp_size: int) -> list[list[int]]:
    """The scan takes the pieces of a sequence from its end."""
    places = _piece_places(layout, cp_size)
    last = max(max(mine) for mine in places)
    return [[last - place for place in mine] for mine in places]


def own_piece_carried(operator: context.Operator, inclusive: Tensor) -> Tensor:
    """A piece's carry holds the piece itself."""
    return inclusive


def suffix_carried_from_the_front(self: context.ContextParallelScan, channel: Channel, *state: Any) -> Joined:
    """What comes after a piece is taken to be what comes before it."""
    return _carry(self, channel._replace(reach="prefix"), *state)


def totals_of_the_first_rank(self: context.ContextParallelScan, channel: Channel, state: Tensor, *closed: Any) -> Joined:
    """A sequence's total is that of its first piece."""
    return _carry(self, channel, state, *closed)._replace(totals=state[..., 0])


def share_of_the_first_rank(shares: list[Tensor]) -> Tensor:
    """The loss is rank 0's share."""
    return shares[0]


def routing_shifted() -> AbstractContextManager[Any]:
    """Each token follows the routing of the one before it. For engines; megatron is imported only here."""
    from ctpo_megatron.mcore.host import prepare_host

    prepare_host("cpu")
    from ctpo_megatron.mcore.model.routing import Routers

    set_micro_batch = Routers.set_micro_batch

    def shifted(self: Routers, *args: Any, routed_experts: Tensor | None) -> None:
        rolled = None if routed_experts is None else routed_experts.roll(1, 0)
        set_micro_batch(self, *args, routed_experts=rolled)

    return patch.object(Routers, "set_micro_batch", shifted)


EVERYWHERE: dict[str, Fault] = {
    "position off by one": lambda: patch.object(prepare, "channels", position_off_by_one),
    "tool tokens counted": lambda: patch.object(prepare, "channels", tool_tokens_counted),
    "reset at every turn": lambda: patch.object(prepare, "channels", reset_at_every_turn),
    "gradient through the prefix": lambda: patch.dict(
        OBJECTIVES, ctpo=OBJECTIVES["ctpo"]._replace(loss=gradient_through_the_prefix)
    ),
}
ACROSS_RANKS: dict[str, Fault] = {
    "pieces reversed": lambda: patch.object(context, "piece_places", pieces_reversed),
    "own piece carried": lambda: patch.object(context, "shift", own_piece_carried),
    "totals not summed": lambda: patch.object(context.ContextParallelScan, "carry", totals_of_the_first_rank),
    "share not summed": lambda: patch.object(spread, "summed", share_of_the_first_rank),
}
OF_SCANS: dict[str, Fault] = {
    **{name: fault for name, fault in ACROSS_RANKS.items() if name != "share not summed"},
    "suffix carried from the front": lambda: patch.object(context.ContextParallelScan, "carry", suffix_carried_from_the_front),
}
