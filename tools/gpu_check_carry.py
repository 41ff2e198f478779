"""What a machine that has torch, but no network, needs besides: packages copied from the environment of this Python."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

MAX_MIB = 64
# What the check imports and a machine with torch may lack: Megatron-Core, msgspec, pydantic and rich with what they need. All are
# pure Python but msgspec, pydantic_core and megatron-core's index of data sets, which is not used.
PYDANTIC = ("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions")
CARRIED = ("megatron-core", "einops", "msgspec", *PYDANTIC, "rich", "markdown-it-py", "mdurl", "Pygments")
COMPILED = (".so", ".pyd")
PLATFORM = "x86_64-manylinux_2_28"


def carry(folder: Path, python: str) -> dict[str, int]:
    """Copy the packages for a Python of that version (3.12) into `folder`; returns their sizes in bytes.

    A compiled one for another version than this one comes from the registry, by uv. Raises FileExistsError where the folder is
    not empty, PackageNotFoundError for one that is not installed here.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give a new folder")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    sizes = {}
    for name in CARRIED:
        package = importlib.metadata.distribution(name)
        target = folder / "part"
        if python == here or not is_compiled(package):
            _copy(package, target)
        else:
            _download(package, target, python)
        sizes[f"{name} {package.version}"] = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        shutil.copytree(target, folder, dirs_exist_ok=True)
        shutil.rmtree(target)
    return sizes


def is_compiled(package: Distribution) -> bool:
    """Whether a package has files that fit one version of Python only."""
    return any(file.suffix in COMPILED for file in _files(package))


def _files(package: Distribution) -> list[Path]:
    """The package's files, relative to where packages are; without commands, which lie elsewhere, and bytecode."""
    files = [Path(str(file)) for file in package.files or []]
    return [file for file in files if ".." not in file.parts and file.suffix != ".pyc"]


def _copy(package: Distribution, target: Path) -> None:
    for file in _files(package):
        source = Path(str(package.locate_file(str(file))))
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target / file)


def _download(package: Distribution, target: Path, python: str) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", python, "--python-platform", PLATFORM]
    command = [uv, "pip", "install", "--quiet", "--target", str(target), *options, f"{package.name}=={package.version}"]
    subprocess.run(command, check=True)
