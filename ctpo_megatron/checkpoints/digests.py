"""Hashes of what a checkpoint holds: BLAKE2b of 128 bits, about 1 GB/s on one core. Imports torch only where tensors come."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 24  # bytes read at a time


def new_digest() -> hashlib.blake2b:
    """An empty hash."""
    return hashlib.blake2b(digest_size=16)


def text_digest(text: str) -> str:
    """Of a text."""
    return bytes_digest(text.encode())


def bytes_digest(content: bytes | memoryview) -> str:
    """Of bytes."""
    digest = new_digest()
    digest.update(content)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    digest = new_digest()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Of a CPU tensor's values, row by row; neither its number format nor its shape takes part, nor the file it lies in."""
    import torch

    return bytes_digest(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
