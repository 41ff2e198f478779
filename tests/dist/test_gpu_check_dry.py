"""The dry form of tools/gpu_check.py: every row runs on a CPU, in processes of its own, or says that it needs a GPU."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.gpu_check import ROOT, import_from_tools, run_gpu_check
from tests.support.layers import imports

pytestmark = [pytest.mark.dist, pytest.mark.long]

NEEDS_GPU = {
    "loss, no wait for the device",
    "waits in a training step",
    "optimizer on the host",
    "memory of a step",
    "memory of a snapshot",
    "update group of two",
}
# what a machine with torch has, by the names under which it is imported; the rest is carried there
WITH_TORCH = {"torch", "numpy", "safetensors", "aiohttp"}
# compiled code for CPUs is loaded where numba is found, with which llvmlite comes: tests/processes/kernels/test_without_numba.py
DONE_WITHOUT = {"numba", "llvmlite"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    return import_from_tools(monkeypatch)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu_check")
    done = run_gpu_check("--dry", "--json", str(folder / "found.json"), "--logs", str(folder / "logs"))
    assert done.returncode == 0, done.stdout + done.stderr
    logs = "".join(log.read_text() for log in (folder / "logs").iterdir())
    return {**json.loads((folder / "found.json").read_text()), "table": done.stdout, "logs": logs}


def test_every_row_runs_on_a_cpu_or_says_that_it_needs_a_gpu(dry: dict[str, Any], tool: Callable[[str], ModuleType]) -> None:
    names = [row.name for row in tool("gpu_check_rows").ROWS]
    assert [row["name"] for row in dry["rows"]] == [*names, "lines about CUDA"]
    not_run = {row["name"]: row["found"] for row in dry["rows"] if row["verdict"] == "not run"}
    assert not_run == dict.fromkeys(NEEDS_GPU, "needs a GPU")
    wrong = [row for row in dry["rows"] if row["verdict"] not in ("ok", "measured", "not run")]
    assert not wrong, dry["logs"]


def test_the_same_computed_twice_is_the_same(dry: dict[str, Any]) -> None:
    """Device and reference are both the CPU here, in two processes."""
    compared = [row["found"] for row in dry["rows"] if row["name"].startswith("trainer rank")]
    assert len(compared) == 4
    assert all(found.count(" 0.0e+00") == 6 for found in compared), compared


def test_lines_about_cuda(dry: dict[str, Any]) -> None:
    ran = {line.partition(":")[0] for line in dry["lines that ran"]}
    assert {"mcore/host_weights.py", "mcore/model/spec.py", "weights/transports/colocated.py"} & ran
    left = {each["line"].partition(":")[0]: each["needs"] for each in dry["lines that did not run"]}
    assert left["mcore/host.py"] == ""  # a GPU, and nothing else
    assert left["cluster/ray_cluster.py"] == "ray"


def test_a_bare_machine_with_torch_and_what_is_carried_is_enough(dry: dict[str, Any], tool: Callable[[str], ModuleType]) -> None:
    """Imports of this package and of the tools, read from their source; what others import they bring or do without."""
    carried = {name.replace("-", "_") for name in tool("gpu_check_carry").CARRIED} | {"megatron"}
    assert third_party_imports(dry["modules"]) - DONE_WITHOUT <= carried | WITH_TORCH


def third_party_imports(modules: list[str]) -> set[str]:
    """First names of what these files import when they are loaded, besides Python's own modules and this project's."""
    found = set()
    for name in modules:
        tree = ast.parse((ROOT / name).read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found |= {each.name.partition(".")[0] for each in imports(tree, Path(name).relative_to("ctpo_megatron"))}
    return {name for name in found if name not in sys.stdlib_module_names and not name.startswith(("ctpo_megatron", "gpu_check"))}
