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
from ctpo_megatron.weights.transports.prefetch import DigestAccount


def make_sender(
    config: Transport,
    device: torch.device,
    address: str,
    order: SenderOrder | None = None,
    new_account: Callable[[], DigestAccount] | None = None,
) -> WeightSender:
    """This rank's sender. `address`: of this node; `order` and `new_account` as in `sender.ConnectingSender`."""
    if isinstance(config, BroadcastTransport):
        return BroadcastSender(config, order, new_account, device=device, address=address)
    if isinstance(config, ColocatedTransport):
        return ColocatedSender(config, order, new_account, device=device, address=address)
    return DiskSender(config, order, new_account)
