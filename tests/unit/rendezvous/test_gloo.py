"""Sharing a gloo device on a torch that does not let gloo's groups be made elsewhere; tests/dist/test_gloo.py has the rest."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from ctpo_megatron.rendezvous.gloo import share_gloo_device


def test_an_older_torch_keeps_its_own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 has it: no `_backend_type`, and what is registered under the name gloo is not what makes its groups."""
    called = []

    def register_backend(name: str, func: object, extended_api: bool = False, devices: object = None) -> None:
        called.append(name)

    monkeypatch.setattr(dist.Backend, "register_backend", register_backend)
    share_gloo_device()
    assert called == []


def test_a_newer_torch_is_given_the_shared_device(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def register_backend(
        name: str, func: object, extended_api: bool = False, devices: object = None, *, _backend_type: object = None
    ) -> None:
        called.append((name, _backend_type))

    monkeypatch.setattr(dist.Backend, "register_backend", register_backend)
    share_gloo_device()
    assert called == [("gloo", dist.ProcessGroup.BackendType.GLOO)]
