"""The rooms of the tests: `make test` runs each, CI every test, CONTRIBUTING names each; in tests/unit none starts a process."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
START = {"subprocess", "multiprocessing"}
APART = "tests/harnesses"  # its packages have an environment of their own; `make test-harnesses` runs it


def starters(directory: Path) -> list[str]:
    """The files below it, with lines, that import what starts processes."""
    found = []
    for path in sorted(directory.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.relative_to(directory)}:{node.lineno}" for name in names if name.partition(".")[0] in START]
    return found


@pytest.mark.thorough
def test_unit_tests_start_no_processes() -> None:
    assert starters(TESTS / "unit") == [], "tests that start processes and wait for them belong into tests/processes"


@pytest.mark.parametrize(
    "source", ["import subprocess\n", "from multiprocessing.pool import Pool\n", "import os, subprocess as s"]
)
def test_one_that_does_is_found(tmp_path: Path, source: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "test_good.py").write_text("import signal\n\nsubprocess = 1\n")
    assert starters(tmp_path) == []
    (tmp_path / "a" / "test_bad.py").write_text(f"def f():\n    {source}\n")
    assert starters(tmp_path) == ["a/test_bad.py:2"]


def test_every_room_is_run_and_described() -> None:
    rooms = sorted({f"tests/{path.relative_to(TESTS).parts[0]}" for path in TESTS.rglob("test_*.py")})
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert sorted([*options["testpaths"], APART]) == rooms
    assert f"pytest {APART}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    contributing, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "README.md"))
    assert [room for room in rooms if f"| {room} |" not in contributing] == []
    tree = next(block for block in readme.split("```") if "\ntests/unit" in block)
    assert [room for room in rooms if room.partition("/")[2] not in tree] == []


def test_ci_runs_what_make_test_leaves_out() -> None:
    """By the marker `long`, which stands only where `make test-long` looks."""
    makefile, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", ".ci/run"))
    assert '-m "not long"\n' in makefile
    (looked,) = (line for line in makefile.splitlines() if "-m long" in line)
    marked = sorted({path for path in TESTS.rglob("test_*.py") if "pytest.mark." + "long" in path.read_text(encoding="utf-8")})
    assert marked
    assert [path for path in marked if f"tests/{path.relative_to(TESTS).parts[0]}" not in looked.split()] == []
    assert [target for target in ("test", "test-long") if f"\ntests {target}" not in ci] == []
