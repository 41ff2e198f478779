"""The transport that the configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ctpo_megatron.config.weights import BroadcastTransport, ColocatedTransport, Transport
from ctpo_megatron.weights.protocol import WeightSender
from ctpo_megatron.weights.transports.broadcast import BroadcastSender
from ctpo_megatron.weights.transports.colocated import ColocatedSender
from ctpo_megatron.weights.transports.disk import DiskSender
from ctpo_megatron.weights.transports.order import SenderOrder
from ctpo_megatron.weights.transports.prefetch import Expected


def make_sender(
    config: Transport,
    device: torch.device,
    address: str,
    turns: SenderOrder,
    new_expected: Callable[[], Expected] | None = None,
) -> WeightSender:
    """This rank's end of it. `address`: of this node; `new_expected` makes the account of one publication's digests."""
    common = {"turns": turns, "new_expected": new_expected}
    if isinstance(config, BroadcastTransport):
        return BroadcastSender(config, device=device, address=address, **common)
    if isinstance(config, ColocatedTransport):
        return ColocatedSender(config, device=device, address=address, **common)
    return DiskSender(config, **common)
