"""The rules of the package's structure, checked on its source: who may import what, and how long a file or function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "ctpo_megatron"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# (layer, place within the layer). A module may import what is strictly below it, and its own unit. Units of one place do not
# import each other. Files and folders right below the package are units.
ORDER = {
    "errors": (0, 0),
    "imports": (0, 0),
    "types": (0, 0),
    "ports": (0, 0),
    "sinks": (0, 0),
    "config": (0, 1),
    "environment": (0, 1),
    "models": (0, 2),
    "checkpoints": (0, 2),
    "record": (0, 2),
    "toy": (0, 3),
    "kernels": (1, 0),
    "rendezvous": (1, 0),
    "algorithms": (1, 1),
    "parallel": (1, 2),
    "batch": (1, 3),
    "mcore": (2, 0),
    "engine": (2, 0),
    "rollout": (2, 0),
    "data": (2, 0),
    "planning": (2, 0),
    "agents": (2, 1),
    "weights": (3, 0),
    "cluster": (4, 0),
    "slurm": (4, 0),
    "loop": (5, 0),
    "simulation": (5, 1),
    "report": (5, 1),
    "doctor": (6, 0),
    "jobs": (6, 0),
    "cli_models": (6, 1),
    "cli_runs": (6, 2),
    "cli": (6, 3),
}
# besides the order: the loop reaches what runs elsewhere through Protocols only
FORBIDDEN_UNITS = {"loop": {"weights", "cluster", "engine", "mcore"}}
# third-party packages that only some places may import: beginnings of paths
ONLY_IN = {
    "megatron": ("mcore/",),
    "transformer_engine": ("mcore/",),
    "apex": ("mcore/",),
    "ray": ("cluster/",),
    "sglang": ("engine/sglang/",),
}
# The whole configuration is read from this layer on, and by `config` itself; below it a unit is given the sections that it needs.
WHOLE_CONFIG_FROM = 4
WHOLE_CONFIG, WHOLE_CONFIG_MODULES = "RunConfig", (f"{PACKAGE}.config.run", f"{PACKAGE}.config.load")
NO_TORCH = {
    "errors",
    "imports",
    "types",
    "ports",
    "sinks",
    "config",
    "environment",
    "models",
    "record",
    "rollout",
    "planning",
    "report",
    "doctor",
}


@dataclass(frozen=True)
class Import:
    """One import statement: the module it names, and where it stands."""

    name: str
    line: int


def offences(root: Path) -> list[str]:
    """Every broken rule below the package directory `root`, as `file:line: what`; an empty list when all is well."""
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
        found += [f"{place}:{line}: {what}" for line, what in _problems(place, source, tree)]
    return found


def _problems(place: Path, source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    unit = place.parts[0].removesuffix(".py")
    if unit not in ORDER and unit != "__init__":
        yield 1, f"{unit!r} has no place in the layers; give it one in tests/support/layers.py"
        return
    for each in imports(tree, place):
        yield from ((each.line, what) for what in _import_problems(unit, place, each.name))
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        yield lines, f"{lines} lines; at most {MAX_FILE_LINES}"
    if unit != "config" and ORDER.get(unit, (WHOLE_CONFIG_FROM, 0))[0] < WHOLE_CONFIG_FROM:
        yield from ((line, f"{unit} uses {WHOLE_CONFIG}; give it sections of it") for line in _whole_config_lines(tree, place))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines; at most {MAX_FUNCTION_LINES}"


def _import_problems(unit: str, place: Path, name: str) -> Iterator[str]:
    top, _, rest = name.partition(".")
    if top == PACKAGE:
        other = rest.partition(".")[0]
        if other in ORDER and other != unit:
            if unit == "__init__" or ORDER[other] >= ORDER[unit]:
                yield f"{unit} imports {other}, which is not below it"
            elif other in FORBIDDEN_UNITS.get(unit, ()):
                yield f"{unit} imports {other}; it may know it by a Protocol only"
        return
    allowed = ONLY_IN.get(top)
    if allowed is not None and not place.as_posix().startswith(allowed):
        yield f"imports {top}, which belongs in {', '.join(allowed)}"
    if top == "torch" and unit in NO_TORCH:
        yield f"imports torch; {unit} does without"


def _whole_config_lines(tree: ast.Module, place: Path) -> list[int]:
    """The lines that get at the whole configuration: by its name, or by a module that is only about it."""
    lines = {each.line for each in imports(tree, place) if each.name in WHOLE_CONFIG_MODULES}
    for node in ast.walk(tree):
        named = isinstance(node, ast.ImportFrom) and any(alias.name == WHOLE_CONFIG for alias in node.names)
        if named or (isinstance(node, ast.Attribute) and node.attr == WHOLE_CONFIG):
            lines.add(node.lineno)
    return sorted(lines)


def imports(tree: ast.Module, place: Path) -> Iterator[Import]:
    """All imports of a module at any depth, also inside functions; relative ones as absolute names."""
    package = (PACKAGE, *place.parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            if module == PACKAGE:  # `from ctpo_megatron import x`: x is what is imported
                yield from (Import(f"{PACKAGE}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield Import(module, node.lineno)
