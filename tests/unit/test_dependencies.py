"""setup.py declares what the code imports, no more and no less, and the lock has each; planted faults are found."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ("ctpo_megatron", "launch")  # what a user runs: install_requires
DEVELOPED = ("tools", "tests")  # what a developer runs: the extra `dev` besides
SHOWN = ("examples",)  # harnesses of others: the extra `agents` besides
APART = "examples/harnesses"  # those that need other packages than a run: tests/harnesses/requirements.txt
# distributions of those packages, where their names differ from the modules'
APART_NAMES = {"agents": "openai-agents", "minisweagent": "mini-swe-agent", "pydantic_ai": "pydantic-ai-slim", "yaml": "pyyaml"}
PINNED = r"[a-z0-9-]+==[A-Za-z0-9.+!]+"
OWN = {"ctpo_megatron", "tests", "examples"} | {
    file.stem for file in (ROOT / "tools").glob("*.py")
}  # tests import what tools share
DISTRIBUTIONS = metadata.packages_distributions()
# declared and imported nowhere, with the reason
NOT_IMPORTED = {
    "tensorboard": "the viewer of what a run writes",
    "crc32c": "tensorboardX's checksums, which without it take 0.3 s for each megabyte",
    "httptools": "uvicorn, SGLang's web server, reads requests by it where it is there, and otherwise in Python",
    "pillow": "tensorboardX imports it for pictures",
    "wandb": "record/sink_process.py asks for it by name, where a run wants it",
    "mlflow-skinny": "record/sink_process.py asks for it by name, where a run wants it",
    "transformer-engine": "Megatron-Core imports it where there are GPUs",
    "pytest-timeout": "pytest loads it; pyproject.toml sets its limit",
    "pytest-instafail": "pytest loads it; pyproject.toml switches it on",
    "ruff": "a command of `make lint`",
    "mypy": "a command of `make lint`",
    "types-psutil": "read by mypy",
    "types-pyyaml": "read by mypy",
    "types-requests": "read by mypy",
}


def load_lock_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK_TOOL = load_lock_tool()


def imported(root: Path, places: tuple[str, ...]) -> dict[str, str]:
    """Where (file:line) each foreign top-level module is first imported below `places`; relative imports are its own."""
    found: dict[str, str] = {}
    for file in sorted(file for place in places for file in (root / place).rglob("*.py")):
        if APART not in places and file.is_relative_to(root / APART):
            continue
        neighbours = {other.stem for other in file.parent.glob("*.py")}  # a script finds those without a package
        for node in ast.walk(ast.parse(file.read_text())):
            for name in sorted(top_level_names(node) - OWN - neighbours - sys.stdlib_module_names):
                found.setdefault(name, f"{file.relative_to(root)}:{node.lineno}")
    return found


def top_level_names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return {node.module.partition(".")[0]}
    return set()


def providers(module: str) -> set[str]:
    """Normalized names of the distributions that contain a top-level module; its own name where none is installed."""
    return {LOCK_TOOL.normalize(name) for name in DISTRIBUTIONS.get(module, [module])}


def offences(root: Path) -> list[str]:
    """What is imported and not declared, and what is declared and not imported, below a checkout's root."""
    requirements = LOCK_TOOL.declared(root / "setup.py")
    names = {extra: {LOCK_TOOL.normalize(each.name) for each in some} for extra, some in requirements.items()}
    installed, developed, shown = (imported(root, places) for places in (INSTALLED, DEVELOPED, SHOWN))
    found = []
    for modules, allowed, place in (
        (installed, names[""], "install_requires"),
        (developed, names[""] | names["dev"], "install_requires or the extra dev"),
        (shown, names[""] | names.get("agents", set()), "install_requires or the extra agents"),
    ):
        for module, where in modules.items():
            if not providers(module) & allowed:
                found.append(f"{where}: {module} comes with {sorted(providers(module))}; setup.py lacks it in {place}")
    used = {name for module in (installed | developed | shown) for name in providers(module)}
    for extra, some in names.items():
        needless = some - used - NOT_IMPORTED.keys()
        found += [f"setup.py: nothing imports {name} of {extra or 'install_requires'}" for name in sorted(needless)]
    return found


@pytest.mark.thorough
def test_setup_declares_what_is_imported_and_nothing_else() -> None:
    assert offences(ROOT) == []


def test_every_exception_is_declared() -> None:
    declared = {LOCK_TOOL.normalize(each.name) for some in LOCK_TOOL.declared(ROOT / "setup.py").values() for each in some}
    assert NOT_IMPORTED.keys() - declared == set()


@pytest.mark.parametrize(
    ("place", "source", "expected"),
    [
        (
            "ctpo_megatron/a.py",
            "import yaml\n",
            "ctpo_megatron/a.py:1: yaml comes with ['pyyaml']; setup.py lacks it",
        ),
        ("ctpo_megatron/a.py", "def f():\n    from yaml import x\n", "ctpo_megatron/a.py:2: yaml comes with"),
        (
            "ctpo_megatron/a.py",
            "import pytest\n",
            "ctpo_megatron/a.py:1: pytest comes with ['pytest']; setup.py lacks it",
        ),
        ("launch/a.py", "import pytest\n", "launch/a.py:1: pytest"),
        ("tools/a.py", "import absent_module.part\n", "tools/a.py:1: absent_module comes with ['absent-module']"),
        ("tests/unit/a.py", "import xdist\n", "tests/unit/a.py:1: xdist comes with ['pytest-xdist']"),
        ("tests/unit/a.py", "import torch\n", "setup.py: nothing imports numpy of install_requires"),
        ("ctpo_megatron/a.py", "import numpy\n", "setup.py: nothing imports pytest of dev"),
    ],
)
def test_planted_faults_are_found(tmp_path: Path, place: str, source: str, expected: str) -> None:
    write(tmp_path / "setup.py", 'setup(install_requires=["numpy>=2"], extras_require={"dev": ["pytest>=8", "ruff"]})\n')
    write(tmp_path / place, source)
    assert expected in "\n".join(offences(tmp_path))


def test_what_is_declared_or_the_projects_own_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path / "setup.py", 'setup(install_requires=["Numpy"], extras_require={"dev": ["py.test", "pytest", "ruff"]})\n')
    write(tmp_path / "ctpo_megatron" / "a.py", "import os\nimport numpy as np\nfrom ctpo_megatron import b\nfrom . import c\n")
    write(tmp_path / "tools" / "other.py", "import numpy.linalg\n")
    write(tmp_path / "tools" / "a.py", "import other\nfrom tests.support import x\nimport pytest\n")
    assert offences(tmp_path) == ["setup.py: nothing imports py-test of dev"]


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_lock_has_an_allowed_version_of_everything_and_names_no_index() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(PINNED, line)] == []
    locked = dict(line.split("==") for line in lines)
    requirements = LOCK_TOOL.declared(ROOT / "setup.py")
    for each in (*requirements[""], *requirements["dev"], *requirements["agents"]):
        assert LOCK_TOOL.normalize(each.name) in locked, f"{each} is not in requirements.lock; run tools/lock.py"
        assert each.specifier.contains(locked[LOCK_TOOL.normalize(each.name)], prereleases=True), each


def test_what_gpu_hosts_add_is_pinned_and_fits_the_rest() -> None:
    """TransformerEngine: its parts at one version that setup.py and Megatron-Core allow. Nothing that is locked is changed."""
    lines = [line for line in (ROOT / "requirements-gpu.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(PINNED, line)] == []
    added = dict(line.split("==") for line in lines)
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#"))
    assert added.keys() & locked.keys() == set()
    (engine,) = {added[name] for name in added if name.startswith("transformer-engine")}
    cuda = importlib.import_module("torch").version.cuda
    assert f"transformer-engine-cu{cuda.partition('.')[0]}" in added, "compiled for the CUDA of the locked torch"
    (declared,) = LOCK_TOOL.declared(ROOT / "setup.py")["gpu"]
    megatron = [Requirement(line) for line in metadata.requires("megatron-core") or []]
    wanted = [declared, *(each for each in megatron if each.name == "transformer-engine")]
    assert len(wanted) == 2
    assert [str(each) for each in wanted if not each.specifier.contains(engine)] == []


def test_what_the_harnesses_apart_import_is_pinned_for_them() -> None:
    lines = (ROOT / "tests" / "harnesses" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(PINNED, line)] == []
    pinned = {line.partition("==")[0] for line in pins}
    needed = {APART_NAMES.get(module, LOCK_TOOL.normalize(module)): where for module, where in imported(ROOT, (APART,)).items()}
    assert len(needed) > 8
    assert {name: where for name, where in needed.items() if name not in pinned} == {}


def test_the_lock_follows_extras_and_names_what_is_missing() -> None:
    with_extra = Requirement("ray[default]")
    assert {"ray", "aiohttp-cors"} <= LOCK_TOOL.needed([with_extra]).keys()
    plain = Requirement("ray")
    assert "aiohttp-cors" not in LOCK_TOOL.needed([plain])
    with pytest.raises(LookupError, match=r"absent-package>=1 is declared but not installed"):
        LOCK_TOOL.needed([Requirement("absent-package>=1")])
