"""The Ray actor that owns one SGLang server; the caller applies `ray.remote`."""

from __future__ import annotations

import threading
from pathlib import Path

from ctpo_megatron.cluster.ray_cluster import node_address
from ctpo_megatron.cluster.server import SGLangServer, free_port, server_args, server_env
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import EngineError

POLL_S = 0.5


class EngineActor:
    """Starts the server on construction and returns at once; `start` waits for it. When the actor dies, the server dies.

    `config.cluster.device` must be resolved. The server listens on this node's address only: the loopback of a local run.
    """

    def __init__(self, config: RunConfig, index: int, log_path: str, api_key: str) -> None:
        device = config.cluster.device
        dtype = config.model.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        host = node_address()
        port = free_port(host)
        engine = config.rollout.engine
        self._timeout_s = engine.start_timeout_s
        self._grace_s = 20.0 if device == "cuda" else 0.0
        self._closed = threading.Event()
        arguments = server_args(
            config.model.path, engine, device=device, dtype=dtype, port=port, seed=config.seed + index, host=host
        )
        self._server = SGLangServer(
            arguments,
            url=f"http://{host}:{port}",
            api_key=api_key,
            log=Path(log_path),
            env=server_env(engine, device=device),
        )

    def start(self) -> str:
        """The server's URL, once it answers. Raises EngineError."""
        self._server.wait_healthy(self._timeout_s)
        return self._server.url

    def watch(self) -> None:
        """Returns when the actor is closed; raises EngineError when the server ends before."""
        while not self._closed.wait(POLL_S):
            if not self._server.alive():
                raise EngineError(self._server.obituary())

    def close(self) -> None:
        """End the server; nothing of it is left afterwards."""
        self._closed.set()
        self._server.stop(self._grace_s)
