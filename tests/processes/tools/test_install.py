"""tools/install.sh in its dry form: which commands it would run. CI runs the form for CPUs; the one for GPUs needs a GPU host."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tools" / "install.sh"


def dry(*words: str, **environment: str) -> tuple[list[list[str]], str]:
    """The commands that the script would run, in words, and all that it printed."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_")) and name != "CPATH"}
    command = ["sh", str(SCRIPT), *words]
    done = subprocess.run(command, cwd=ROOT, env=bare | environment, capture_output=True, text=True, timeout=120, check=True)
    lines = [line[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]
    return [shlex.split(line) for line in lines], done.stdout


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment with this interpreter and a uv that must not be called."""
    (tmp_path / "bin").mkdir()
    for name, body in (("python", f'exec {sys.executable} "$@"'), ("uv", "exit 1")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_the_environment_of_every_host(venv: Path) -> None:
    commands, _ = dry("--dry-run", str(venv))
    assert [command[1:5] for command in commands] == [
        ["-m", "pip", "install", "--quiet"],
        ["pip", "install", "--no-deps", "--compile-bytecode"],
        ["pip", "install", "--no-deps", "--no-build-isolation"],
        ["pip", "check"],
    ]
    assert not (venv / "pyvenv.cfg").exists(), "nothing was made"


def test_an_environment_that_is_missing_is_made_first(tmp_path: Path) -> None:
    commands, _ = dry("--dry-run", str(tmp_path / "new"))
    assert commands[0][1:] == ["-m", "venv", "--clear", str(tmp_path / "new")]
    assert not (tmp_path / "new").exists()


def test_transformer_engine_is_built_with_the_torch_that_is_installed(venv: Path) -> None:
    """Its wheels first, then the part for torch from source: no isolation, no cache, no build for another torch."""
    commands, printed = dry("--gpu", "--dry-run", str(venv), CPATH="/opt/include")
    wheels, source, check = commands[:3]
    pins = [line for line in (ROOT / "requirements-gpu.lock").read_text().splitlines() if not line.startswith("#")]
    assert wheels[1:6] == ["pip", "install", "--no-deps", "--only-binary", ":all:"]
    assert source[-1] == "transformer-engine-torch==2.11.0"
    assert sorted([*wheels[6:], source[-1]]) == sorted(pins)
    assert source[0] == "env"
    given = dict(word.split("=", 1) for word in source[1:] if "=" in word.partition("/")[0])
    assert given["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE"
    assert given["CPATH"] == f"{sysconfig.get_paths()['purelib']}/nvidia/cudnn/include:/opt/include"
    assert {"--no-deps", "--no-build-isolation", "--no-cache", "--reinstall-package"} <= set(source)
    assert check[1:] == ["pip", "check"]
    for name in ("apex", "flash-attn"):
        assert f"\n  {name} " in printed, "what is left out is named"


def test_the_base_comes_first(tmp_path: Path) -> None:
    done = subprocess.run(["sh", str(SCRIPT), "--gpu", "--dry-run", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "run `make install` first" in done.stderr


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(["sh", str(SCRIPT), "--gpus", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, "unknown option --gpus" in done.stderr) == (1, True)


def test_a_host_without_a_toolkit_is_told_before_anything_is_installed(venv: Path) -> None:
    """Not a dry run; the uv of this environment would fail with exit code 1 and no word."""
    environment = os.environ | {"CUDA_HOME": str(venv / "nothing"), "PYTHONPATH": str(ROOT)}
    command = ["sh", str(SCRIPT), "--gpu", str(venv)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "install: SGLang compiles kernels when it starts on GPUs, and cannot on this node. nvcc:" in done.stderr


def test_make_builds_again_where_the_base_or_the_pins_changed() -> None:
    done = subprocess.run(["make", "-n", "-W", "requirements-gpu.lock", "install-gpu"], cwd=ROOT, capture_output=True, text=True)
    assert "sh tools/install.sh --gpu .venv" in done.stdout
