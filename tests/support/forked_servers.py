"""SGLang servers forked from one process for many tests (`engine.nursery`), as a run's servers are: importing SGLang is most of
what a start costs. tests/integration/test_sglang_ends.py starts them from nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ctpo_megatron.config.rollout import EngineConfig
from ctpo_megatron.engine.nursery import Nursery
from ctpo_megatron.engine.server_args import server_env


@contextlib.contextmanager
def forking() -> Iterator[Path]:
    """Inside it servers can be forked by whoever knows the socket that it gives."""
    with contextlib.closing(Nursery(server_env(EngineConfig(), device="cpu"))) as nursery:
        yield nursery.place
