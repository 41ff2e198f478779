"""CUDA toolkits made of empty files and small scripts."""

from __future__ import annotations

from pathlib import Path


def put(path: Path, body: str = "") -> None:
    """A script at `path` that does what `body` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make_toolkit(directory: Path) -> Path:
    """A toolkit of CUDA 13.0 in `directory`, with a C++ compiler in its `bin`; the place of the toolkit."""
    root = directory / "cuda"
    put(root / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart.so").touch()
    put(directory / "bin" / "c++")
    return root
