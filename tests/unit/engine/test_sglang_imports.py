"""What a server does before it imports SGLang; it is imported nowhere here."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys

import pytest
import torch

from ctpo_megatron.engine.sglang.imports import (
    ABSENT_AT_FIRST,
    ABSENT_IN_SERVERS,
    ABSENT_IN_SERVERS_ON_CPU,
    ABSENT_ON_CPU,
    hide_kernels,
    lean_server,
    nothing_compiled,
)
from ctpo_megatron.imports import modules_stay


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("name", ABSENT_ON_CPU)
def test_kernels_are_hidden_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, name: str, cuda: bool) -> None:
    """From `import` as from those who only ask whether it is installed."""
    monkeypatch.setitem(sys.modules, name, None)  # to be as it was afterwards
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    hide_kernels()
    assert (importlib.util.find_spec(name) is not None) is cuda
    assert (name in sys.modules) is not cuda


@pytest.mark.parametrize("cuda", [False, True])
def test_a_server_imports_without_what_it_does_not_use(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """What is optional can be imported again afterwards; what nobody uses cannot."""
    on_cpu = (*ABSENT_ON_CPU, *ABSENT_IN_SERVERS_ON_CPU)
    for name in (*ABSENT_IN_SERVERS, *on_cpu, *ABSENT_AT_FIRST):
        monkeypatch.setitem(sys.modules, name, None)  # to be as it was afterwards
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)

    def hidden() -> set[str]:
        return {name for name in (*ABSENT_IN_SERVERS, *on_cpu, *ABSENT_AT_FIRST) if importlib.util.find_spec(name) is None}

    with lean_server():
        assert hidden() == {*ABSENT_IN_SERVERS, *(() if cuda else (*on_cpu, *ABSENT_AT_FIRST))}
    assert hidden() == {*ABSENT_IN_SERVERS, *(() if cuda else on_cpu)}


def test_what_is_loaded_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ABSENT_ON_CPU:
        monkeypatch.setitem(sys.modules, name, gc)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hide_kernels()
    assert all(sys.modules[name] is gc for name in ABSENT_ON_CPU)


def test_garbage_is_looked_for_after_imports_and_not_in_them() -> None:
    """Also after one that fails."""
    before = gc.get_freeze_count()
    with contextlib.suppress(ImportError), modules_stay():
        inside = gc.isenabled()
        raise ImportError
    after, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.unfreeze()
    assert (inside, after) == (False, True)
    assert frozen > before


@pytest.mark.parametrize("cuda", [False, True])
def test_functions_stay_as_they_are_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """Decorated with arguments or without; torch's compiler is back afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    before = torch.compile
    with nothing_compiled():
        assert (torch.compile is before) is cuda
        if not cuda:
            assert torch.compile(len) is len
            assert torch.compile(dynamic=True, disable=False)(len) is len
    assert torch.compile is before
