"""Lets the store at which a server's ranks meet listen at the server's own address.

SGLang 0.5.23 leaves the store to torch, which listens on every interface whatever the address (`init_process_group` with
`tcp://HOST:PORT`). torch takes a store that this process serves at the port already, where both allow it (`multi_tenant`); so a
hook of SGLang's plugin framework serves one at that address as soon as the address is known. tests/unit/rendezvous/test_store.py
tells when torch's own store listens at its address, and this is no longer needed.
"""

from __future__ import annotations

from datetime import timedelta
from urllib.parse import urlparse

import torch.distributed as dist
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

from ctpo_megatron.rendezvous.store import serve_store

TARGET = "sglang.srt.distributed.bootstrap._resolve_dist_init_method"
TIMEOUT = timedelta(minutes=5)  # torch's own for a store

_served: list[dist.TCPStore] = []  # kept as long as the process: a store without an owner closes


def register() -> None:
    """Call it before SGLang applies what is registered, in every process of a server."""
    HookRegistry.register(TARGET, serve, HookType.AFTER)


def serve(method: str, **_arguments: object) -> str:
    """`method`, where the ranks of the server are to meet, once its first rank serves the store there."""
    parallel, where = get_parallel(), urlparse(method)
    if (parallel.tp_rank, parallel.pp_rank) == (0, 0) and where.scheme == "tcp" and where.hostname and where.port:
        _served.append(serve_store(where.hostname, where.port, timeout=TIMEOUT, multi_tenant=True))
    return method
