"""tools/gpu_check.py without a GPU: its bounds on time, and that each kind of row can find a fault."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.gpu_check import ROOT, TOOLS, import_from_tools, run_gpu_check


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    return import_from_tools(monkeypatch)


@pytest.fixture
def place(tool: Callable[[str], ModuleType], tmp_path: Path) -> Any:
    return tool("gpu_check_rows").Place("cpu", tmp_path, True)


PLANTED = """
import os, sys, time
from gpu_check_rows import Found
def fine(place): return Found("fine", True)
def hangs(place): time.sleep(600)
def dies(place): print("a reason", file=sys.stderr, flush=True); os._exit(7)
def raises(place): raise ValueError("a fault\\nwith more lines")
def lacks(place): import a_package_that_is_not_there.part
"""


def test_a_row_that_hangs_dies_or_raises_is_a_fault_and_the_others_run(
    tool: Callable[[str], ModuleType], place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, children = tool("gpu_check_rows"), tool("gpu_check_children")
    (place.folder / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(TOOLS), str(place.folder)]))
    planted = [
        rows.Row(name, "planted", f"planted:{name}", "", 1.0 if name == "hangs" else 30.0)
        for name in ("raises", "hangs", "dies", "lacks", "fine")
    ]
    report, shown = children.Report(), []
    begun = time.monotonic()
    children.run_rows(planted, place, report, deadline=begun + 120, show=shown.append)
    assert time.monotonic() - begun < 60
    assert shown == report.results
    assert {each.name: (each.verdict, each.found) for each in report.results} == {
        "raises": ("FAULT", "ValueError: a fault"),
        "hangs": ("FAULT", "not done after 1 s; its process was ended"),
        "dies": ("FAULT", "its process ended with code 7: a reason"),
        "lacks": ("not run", "package a_package_that_is_not_there is missing"),
        "fine": ("ok", "fine"),
    }


def test_rows_for_which_no_time_is_left_are_not_run(tool: Callable[[str], ModuleType], place: Any) -> None:
    rows, children = tool("gpu_check_rows"), tool("gpu_check_children")
    report = children.Report()
    children.run_rows(list(rows.ROWS), place, report, deadline=time.monotonic(), show=lambda _: None)
    assert {(each.verdict, each.found) for each in report.results} == {("not run", "no time was left")}
    assert len(report.results) == len(rows.ROWS)


def test_every_kernel_of_the_list_has_a_row(tool: Callable[[str], ModuleType]) -> None:
    rows = tool("gpu_check_rows")
    assert list(tool("gpu_check_kernels")._KERNELS) == list(rows.KERNELS)
    assert {f"kernel {name}" for name in rows.KERNELS} <= {row.name for row in rows.ROWS}


def test_a_kernel_that_is_wrong_in_one_case_is_found(tool: Callable[[str], ModuleType], place: Any) -> None:
    kernels = tool("gpu_check_kernels")
    kernel = kernels.Kernel(
        {"small": (torch.ones(2),), "large": (torch.ones(9),)}, lambda x: min(x.numel(), 8), torch.numel, "numel"
    )
    found = kernels.compare_kernel(kernel, place)
    assert (found.holds, found.text) == (False, "differs in 1 of 2 cases against numel: large")


def outcome() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(100, generator=generator) for name in ("logp", "moved", "logp after")}
    return {**drawn, "loss": 0.3, "grad_norm": 2.0, "CTPO's grad_norm": 1.0}


@pytest.mark.parametrize("name", ["logp", "loss", "grad_norm", "CTPO's grad_norm", "moved", "logp after"])
@pytest.mark.parametrize("amount", [0.1, float("nan")])
def test_a_rank_that_computes_something_else_is_found(tool: Callable[[str], ModuleType], name: str, amount: float) -> None:
    rank = tool("gpu_check_rank")
    wanted, found = outcome(), outcome()
    assert rank.compare(found, wanted, rank.FLOAT32)[1]
    found[name] = found[name] + amount
    text, holds = rank.compare(found, wanted, rank.FLOAT32)
    assert not holds
    assert text.count("(>") == 1


def test_bounds_of_bfloat16_are_what_rounding_explains(tool: Callable[[str], ModuleType]) -> None:
    rank = tool("gpu_check_rank")
    exact, rounded = outcome(), outcome()
    rounded["logp"] = rounded["logp"] + 0.01
    bounds = rank.bfloat16_bounds(rounded, exact)
    assert bounds["logp"] == pytest.approx(0.01, rel=1e-3)
    assert bounds["loss"] == rank.BFLOAT16_LEAST
    other = {**exact, "logp": exact["logp"] + 0.002}
    assert rank.compare(other, rounded, bounds)[1]
    assert not rank.compare({**exact, "logp": exact["logp"] - 0.002}, rounded, bounds)[1]


@pytest.mark.parametrize(("found", "holds"), [(109, True), (91, True), (111, False), (89, False)])
def test_memory_is_held_against_the_plan(tool: Callable[[str], ModuleType], found: int, holds: bool) -> None:
    assert tool("gpu_check_memory").against_plan(found * 2**20, 100 * 2**20).holds is holds


def test_what_a_reader_does_not_see_is_found(
    tool: Callable[[str], ModuleType], place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle of a copy: the digests of the copy are right, but a change in place does not reach it."""
    groups = tool("gpu_check_groups")
    colocated = importlib.import_module("ctpo_megatron.weights.transports.colocated")
    kept: list[Any] = []
    real = colocated.handle

    def of_a_copy(bucket: Any) -> str:
        kept.append([(name, tensor.clone()) for name, tensor in bucket])
        return real(kept[-1])

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(colocated, "handle", of_a_copy)
    found = groups.handover_row(place)
    assert (found.holds, found.text) == (False, "mapped: equal, changed: not equal")


@pytest.mark.parametrize("waits", [True, False])
def test_a_broadcast_that_returns_with_nobody_to_receive_is_a_fault(
    tool: Callable[[str], ModuleType], place: Any, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """Stand-ins for NCCL, which alone would wait or return."""
    groups, gate = tool("gpu_check_groups"), threading.Event()
    monkeypatch.setattr(tool("gpu_check_rank"), "trainer_rank", lambda *_: SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(groups, "join_update_group", lambda *_, **_named: None)
    monkeypatch.setattr(groups.dist, "broadcast", lambda *_, **_named: gate.wait(30) if waits else None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(groups, "SPLIT_S", 1.0)
    found = groups.split_row(place)
    gate.set()
    assert found.holds is waits
    assert found.text == ("still waits after 1 s" if waits else "it returned, with nobody to receive")


SOURCE = '''
def on_device(device, tensor):
    """Says cuda."""
    if device.type == "cuda":
        first()
    else:
        second()
    if device.type != "cuda":
        return third()
    fourth()
    if device not in ("cpu", "cuda"):
        raise ValueError("cuda or cpu")
    torch.cuda.synchronize()
    return tensor.is_cuda


class CudaMeansCpu:
    def fake(self):
        torch.cuda.synchronize()
'''


def test_which_lines_are_about_cuda(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    found = [site.text for site in tool("gpu_check_reached").cuda_sites(tmp_path)]
    assert found == ["first()", "fourth()", "torch.cuda.synchronize()", "return tensor.is_cuda"]


def test_names_of_what_is_for_cpus_only_are_still_in_use(tool: Callable[[str], ModuleType]) -> None:
    source = "".join(file.read_text() for file in (ROOT / "ctpo_megatron").rglob("*.py"))
    for name in tool("gpu_check_reached").ON_CPUS_ONLY:
        assert f"def {name}(" in source or f"class {name}(" in source, name


def test_what_is_carried_fits(tool: Callable[[str], ModuleType], tmp_path: Path) -> None:
    carry = tool("gpu_check_carry")
    sizes = carry.carry(tmp_path / "carried", f"{sys.version_info.major}.{sys.version_info.minor}")
    total = sum(file.stat().st_size for file in (tmp_path / "carried").rglob("*") if file.is_file())
    assert total == sum(sizes.values())
    assert total <= carry.MAX_MIB * 2**20
    assert (tmp_path / "carried" / "megatron" / "core" / "parallel_state.py").is_file()
    code = "import pydantic; print(pydantic.__file__)"
    environment = {"PYTHONPATH": str(tmp_path / "carried")}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(str(tmp_path)), done.stderr
    with pytest.raises(FileExistsError, match="is not empty"):
        carry.carry(tmp_path / "carried", "3.12")


def test_without_a_gpu_it_refuses_and_says_what_to_do() -> None:
    done = run_gpu_check()
    assert done.returncode == 2
    assert "--dry" in done.stderr
