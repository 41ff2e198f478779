"""Which lines of ctpo_megatron are about CUDA, and which of them ran.

A place is a statement whose own expressions name CUDA or NCCL, or the first statement of the branch that such a condition opens
on CUDA. Lines are followed by Python's monitoring (3.12 and newer), which costs nothing after a line's first time and sees every
thread, or by `sys.settrace` of the main thread and of threads that Python starts.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).resolve().parents[1] / "ctpo_megatron"
WORDS = ("cuda", "nccl")
# beginnings of paths whose code needs what the check does without
ELSEWHERE = {"engine/sglang/": "sglang", "cluster/": "ray", "jobs/": "a run", "loop/": "a run", "doctor.py": "ctpo doctor"}
# classes and functions that stand in for CUDA where there is none
ON_CPUS_ONLY = {"CudaMeansCpu", "_bridge_torch_cuda", "_bridge_random_state", "share_gloo_device"}


class Site(NamedTuple):
    """A line about CUDA."""

    file: str  # below the package
    line: int
    text: str

    @property
    def needs(self) -> str:
        """What has to be there to reach it, beyond what the check uses; empty: nothing."""
        return next((needed for start, needed in ELSEWHERE.items() if self.file.startswith(start)), "")

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.text}"


def cuda_sites(root: Path = ROOT) -> list[Site]:
    """All places below the package directory `root`, in order."""
    found = []
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines, file = source.splitlines(), path.relative_to(root).as_posix()
        numbers = {number for block in _blocks(ast.parse(source)) for number in _lines(block)}
        found += [Site(file, number, lines[number - 1].strip()) for number in sorted(numbers)]
    return found


def _blocks(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """Every list of statements inside a function: what runs when it is called, not when the file is read."""
    for function in _on_any_device(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in _on_any_device(function):
                for name in ("body", "orelse", "finalbody"):
                    block = getattr(node, name, None)
                    if isinstance(block, list) and block:
                        yield block


def _on_any_device(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without what is for CPUs only."""
    yield node
    for child in ast.iter_child_nodes(node):
        if getattr(child, "name", None) not in ON_CPUS_ONLY:
            yield from _on_any_device(child)


def _lines(block: list[ast.stmt]) -> Iterator[int]:
    for statement, after in zip(block, [*block[1:], None], strict=True):
        if not _names_cuda(statement):
            continue
        if isinstance(statement, ast.If):
            opened = statement.orelse if _is_negative(statement.test) else statement.body
            on_cuda = opened[0] if opened else after
            if on_cuda is not None and not isinstance(on_cuda, ast.Raise):
                yield on_cuda.lineno
        elif not isinstance(statement, ast.Raise):
            yield statement.lineno


def _names_cuda(statement: ast.stmt) -> bool:
    """Whether the statement itself, not one inside it, names CUDA. Docstrings and messages of errors do not count."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return False
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    heads = [child for child in ast.iter_child_nodes(statement) if not isinstance(child, ast.stmt)]
    return any(_is_word(node) for head in heads for node in ast.walk(head))


def _is_word(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return node.value in WORDS
    return isinstance(node, ast.Attribute) and (node.attr == "cuda" or node.attr.startswith("is_cuda"))


def _is_negative(test: ast.expr) -> bool:
    """Whether the condition holds where there is no CUDA."""
    nodes = list(ast.walk(test))
    return any(isinstance(node, ast.Not | ast.NotEq) for node in nodes)


class Reached:
    """Follows, while it is entered, which lines of files below `root` run for the first time in this process."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._seen: set[tuple[str, int]] = set()
        self._told: set[tuple[str, int]] = set()

    def new(self) -> set[tuple[str, int]]:
        """(file below the root, line) of those that ran since this was asked for last."""
        found = set(self._seen) - self._told
        self._told |= found
        return {(file[len(self._root) + 1 :], line) for file, line in found}

    def __enter__(self) -> Self:
        if sys.version_info >= (3, 12):
            monitoring = sys.monitoring
            monitoring.use_tool_id(monitoring.COVERAGE_ID, "gpu_check")
            monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, self._on_line)
            monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)
        else:
            threading.settrace(self._trace)
            sys.settrace(self._trace)
        return self

    def __exit__(self, *_exc: object) -> None:
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(sys.monitoring.COVERAGE_ID, 0)
            sys.monitoring.free_tool_id(sys.monitoring.COVERAGE_ID)
        else:
            sys.settrace(None)
            threading.settrace(None)

    def _on_line(self, code: CodeType, line: int) -> Any:
        if code.co_filename.startswith(self._root):
            self._seen.add((code.co_filename, line))
        if sys.version_info >= (3, 12):
            return sys.monitoring.DISABLE  # this line need not be told again
        return None

    def _trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(self._root):
            return None

        def line(inner: FrameType, event: str, _argument: Any) -> Any:
            if event == "line":
                self._seen.add((name, inner.f_lineno))
            return line

        return line
