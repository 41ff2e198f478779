"""The Ray actor that owns one SGLang server; the caller applies `ray.remote`."""

from __future__ import annotations

import threading
from pathlib import Path

from ctpo_megatron.cluster.logs import redirect_output
from ctpo_megatron.cluster.ray_cluster import node_address
from ctpo_megatron.cluster.server import SGLangServer, server_args, server_env
from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import ProcessDied
from ctpo_megatron.mcore.hf.routing import replayed_routing
from ctpo_megatron.ports import free_port

POLL_S = 0.25
GPU_GRACE_S = 20.0  # SGLang gives device memory back in order when it may end by itself


class EngineActor:
    """One server of the run. Its process starts with the actor, and ends with it at the latest.

    `seed`: of its sampling. `gpus`: of the trainer, that the server sees; empty: it has the actor's own, or none.
    """

    def __init__(self, config: RunConfig, seed: int, log_path: str, api_key: str, gpus: tuple[str, ...] = ()) -> None:
        redirect_output(Path(log_path))
        device, engine = config.cluster.device, config.rollout.engine
        dtype = config.model.dtype_on(device)
        host = node_address(config)
        port = free_port(host)
        self._timeout_s = engine.start_timeout_s
        self._grace_s = GPU_GRACE_S if device == "cuda" else 0.0
        self._closed = threading.Event()
        arguments = server_args(
            config.model.path,
            engine,
            device=device,
            dtype=dtype,
            port=port,
            seed=seed,
            host=host,
            routed_experts=replayed_routing(config) is not None,
            memory_saver=bool(gpus) and config.servers_sleep,
        )
        self._server = SGLangServer(
            arguments,
            url=f"http://{host}:{port}",
            api_key=api_key,
            log=Path(log_path),
            env=server_env(engine, device=device, gpus=gpus),
        )

    def start(self) -> str:
        """The server's URL, once it answers. Raises EngineError when it does not within rollout.engine.start_timeout_s."""
        self._server.wait_healthy(self._timeout_s)
        return self._server.url

    def watch(self) -> None:
        """Returns when the actor is closed; raises ProcessDied as soon as the server has died."""
        while not self._closed.wait(POLL_S):
            if not self._server.alive() and not self._closed.is_set():
                raise ProcessDied(f"the SGLang server ended with exit code {self._server.exit_code}\n{self._server.log_tail()}")

    def rss_bytes(self) -> int:
        """Resident memory of the server's processes."""
        return self._server.rss_bytes()

    def close(self) -> None:
        """End the server; nothing of it is left afterwards. Safe to call twice."""
        self._closed.set()
        self._server.stop(self._grace_s)
