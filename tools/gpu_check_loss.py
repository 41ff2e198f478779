"""Rows of tools/gpu_check.py about `policy_loss`: its time on a million tokens, and that it never waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from gpu_check_measure import copy_seconds, median_seconds
from gpu_check_rows import Found, Place
from torch import Tensor

from ctpo_megatron.algorithms import Support, policy_loss
from ctpo_megatron.algorithms.objectives import OBJECTIVES

LEAST = 0.85
# bytes of a token that no way of computing CTPO can do without: logp, old_logp and advantages in float32 and the mask are read;
# the loss is a number. The backward reads what the forward kept, at least one float32, and writes the gradient.
FORWARD_BYTES, BACKWARD_BYTES = 3 * 4 + 1, 2 * 4


def inputs(device: str, sequences: int, length: int) -> dict[str, Any]:
    """All that an objective may ask for, of `sequences` packed sequences of `length` tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = sequences * length

    def draw(*columns: int) -> Tensor:
        return -torch.rand(tokens, *columns, generator=generator).to(device)

    logp = draw()
    return {
        "old_logp": logp + 0.01 * draw(),
        "rollout_logp": logp + 0.01 * draw(),
        "logp": logp.requires_grad_(),
        "advantages": draw() + 0.5,
        "mask": draw() > -0.8,
        "cu_seqlens": (torch.arange(sequences + 1) * length).to(torch.int32).to(device),
    }


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Inside it every wait for the device raises RuntimeError: CUDA's own check."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sync_row(place: Place) -> Found:
    """The objectives whose loss or gradient waits for the device."""
    waited = []
    for name in OBJECTIVES:
        given = inputs(place.device, 8, 40)
        support = Support(given["logp"].detach()[:, None], given["old_logp"][:, None])

        def step(given: dict[str, Any] = given, name: str = name, support: Support = support) -> None:
            policy_loss({"type": name}, **given, support=support).loss.backward()

        step()  # the first call of a kernel may load it
        try:
            with no_waits():
                step()
        except RuntimeError as error:
            waited.append(f"{name} ({str(error).splitlines()[0]})")
    return Found(f"waits in {'; '.join(waited)}" if waited else f"none in {len(OBJECTIVES)} objectives", not waited)


def forward_row(place: Place) -> Found:
    """The loss of CTPO as a share of the speed of a copy of the bytes that have to be read."""
    given = _million(place)
    call = lambda: policy_loss({"type": "ctpo"}, **given)  # noqa: E731 - one expression, named for what follows
    return _share(place, median_seconds(call, place.device, cold=True), FORWARD_BYTES)


def backward_row(place: Place) -> Found:
    """The gradient of CTPO's loss as a share of the speed of a copy of the bytes that have to be moved."""
    given = _million(place)
    loss = policy_loss({"type": "ctpo"}, **given).loss
    call = lambda: torch.autograd.grad(loss, given["logp"], retain_graph=True)  # noqa: E731
    return _share(place, median_seconds(call, place.device, cold=True), BACKWARD_BYTES)


def _million(place: Place) -> dict[str, Any]:
    given = inputs(place.device, *((10, 100) if place.dry else (1000, 1000)))
    del given["rollout_logp"]
    return given


def _share(place: Place, seconds: float, bytes_per_token: int) -> Found:
    tokens = 1000 if place.dry else 1_000_000
    share = copy_seconds(tokens * bytes_per_token, place.device) / seconds
    return Found(f"{share:.1%}: {seconds * 1e3:.3f} ms", None if place.dry else share >= LEAST)
