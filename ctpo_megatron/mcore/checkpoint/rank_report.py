"""What one rank tells the others of its part of a checkpoint. Plain data: no megatron, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RankReport:
    """Names what one rank wrote and found again on the disk."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> size, digest
    shards: dict[str, list[list[Any]]] = field(default_factory=dict)  # file -> [name, offset, shape, dtype, digest, begin, end]
