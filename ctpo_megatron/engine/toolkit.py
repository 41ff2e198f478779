"""What SGLang compiles kernels with while a server on GPUs starts, found where SGLang 0.5.23 looks for it.

It compiles the activation of every gated MLP (`sglang.kernels.jit`); flashinfer and Triton compile more. The nvcc that pip
installs with torch is not looked for, and has no library to link against.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.errors import InputError

NVCC_TIMEOUT_S = 20.0
DEFAULT_HOME = Path("/usr/local/cuda")


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that is needed: what was found, and what to do where that will not do (`remedy`, else empty)."""

    name: str
    found: str
    remedy: str = ""


def torch_cuda() -> str:
    """The CUDA that the installed torch was built with, 13.0 for example; empty where there is none. It is not imported."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
    match = re.search(r"^cuda\b.*'([\d.]+)'", file.read_text(), re.MULTILINE) if file is not None and file.exists() else None
    return match[1] if match else ""


def cuda_home(environment: Mapping[str, str]) -> Path:
    """Where SGLang, tvm-ffi and flashinfer look for the CUDA toolkit (`sglang.kernels.jit.utils.compile.toolchain.cuda_home`)."""
    configured = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if configured:
        return Path(configured)
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    return Path(nvcc).parent.parent if nvcc else DEFAULT_HOME


def parts(wanted: str, environment: Mapping[str, str] | None = None) -> list[Part]:
    """The toolkit's compiler and library, a C++ compiler and Python's headers. `wanted`: the CUDA of this torch, 13.0 say."""
    environment = os.environ if environment is None else environment
    home = cuda_home(environment)
    return [_nvcc(home, wanted or "13.0"), _library(home), _host_compiler(environment), _headers()]


def check_toolkit(environment: Mapping[str, str] | None = None) -> None:
    """Raises InputError, which names all that is missing, where a server on GPUs could not compile its kernels."""
    missing = [part for part in parts(torch_cuda(), environment) if part.remedy]
    if missing:
        listed = "; ".join(f"{part.name}: {part.found} ({part.remedy})" for part in missing)
        raise InputError(f"SGLang compiles kernels when it starts on GPUs, and cannot on this node. {listed}. See `ctpo doctor`.")


def version_of(text: str) -> tuple[int, int]:
    """(13, 0) of `13.0`, or of what nvcc says of itself; (0, 0) of what names no version."""
    match = re.search(r"release (\d+)\.(\d+)", text) or re.fullmatch(r"(\d+)\.(\d+).*", text.strip())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _nvcc(home: Path, wanted: str) -> Part:
    compiler = home / "bin" / "nvcc"
    remedy = f"install the CUDA toolkit {wanted} or a newer {wanted.partition('.')[0]}.x and set CUDA_HOME to its directory"
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=NVCC_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Part("nvcc", f"{compiler} does not run: {_short(error)}", remedy)
    version = version_of(done.stdout)
    found = f"{version[0]}.{version[1]} at {compiler}"
    return Part("nvcc", found, "" if version >= version_of(wanted) else f"older than torch's CUDA {wanted}: {remedy}")


def _library(home: Path) -> Part:
    library = home / "lib64" / "libcudart.so"
    if library.exists():
        return Part("CUDA runtime", str(library))
    remedy = (
        "kernels are linked against it: set CUDA_HOME to the toolkit's own directory; a wrapper of nvcc in PATH is not enough"
    )
    return Part("CUDA runtime", f"no {library}", remedy)


def _host_compiler(environment: Mapping[str, str]) -> Part:
    name = environment.get("CXX") or "c++"
    found = shutil.which(name, path=environment.get("PATH"))
    remedy = "" if found else "install a C++ compiler (Debian, Ubuntu: apt-get install g++), or set CXX"
    return Part("C++ compiler", found or f"no {name} in PATH", remedy)


def _headers() -> Part:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.exists():
        return Part("Python headers", str(header))
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return Part("Python headers", f"no {header}", f"Triton compiles against it (Debian, Ubuntu: apt-get install {package})")


def _short(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
