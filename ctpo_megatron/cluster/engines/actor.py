"""The Ray actor that owns one SGLang server, or its part on one node; the caller applies `ray.remote`."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import ray

from ctpo_megatron.cluster.environment import log_line, node_environment
from ctpo_megatron.cluster.logs import redirect_output
from ctpo_megatron.cluster.ray_cluster import node_address, sees_gpu
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.capability import check_fp8, visible_gpus
from ctpo_megatron.engine.gpu_memory import wait_for_gpus
from ctpo_megatron.engine.probe import Probe
from ctpo_megatron.engine.processes import names_of_group, resident
from ctpo_megatron.engine.request_thread import RequestThread
from ctpo_megatron.engine.server import SGLangServer
from ctpo_megatron.engine.server_args import Part, server_args, server_env
from ctpo_megatron.engine.toolkit import check_toolkit
from ctpo_megatron.errors import EngineError, ProcessDied
from ctpo_megatron.models.threads import hidden_size_in
from ctpo_megatron.ports import free_port
from ctpo_megatron.record.heartbeat import Pulse

POLL_S = 0.25
PROCESSES_S = 10.0  # between two looks at which processes a server has
GPU_END_TIMEOUT_S = 20.0  # for a server on GPUs to end by itself: it then gives device memory back in order


class EngineActor:
    """One server of the run, or its part on one of `rollout.engine.nodes`. Its processes end with the actor at the latest.

    `config`: of a run that samples with it; `section`: which one of the user's configuration its `rollout.engine` comes from.
    `seed`: of its sampling. `gpus`: those of the trainer that the server sees; empty: it has the actor's own, or none.
    `routed_experts`: whether it returns which experts it chose for each token. `shared_expert`: whether the model has one.
    `nursery`: the socket of the process that servers of this host are forked from; empty: there is none.
    """

    def __init__(
        self,
        config: RunConfig,
        seed: int,
        log_path: str,
        api_key: str,
        gpus: tuple[str, ...] = (),
        routed_experts: bool = False,
        shared_expert: bool = False,
        nursery: str = "",
        section: str = "rollout.engine",
    ) -> None:
        redirect_output(Path(log_path))
        self._config, self._seed, self._log, self._api_key, self._gpus = config, seed, Path(log_path), api_key, gpus
        self._routed_experts, self._shared_expert = routed_experts, shared_expert
        self._nursery, self._section = Path(nursery) if nursery else None, section
        self._host = node_address(config)
        self._launched: SGLangServer | None = None
        self._closed = threading.Event()
        self._first = True  # of the server's parts, the one that answers requests
        self._probe: Probe | None = None  # once it answers
        self._processes: tuple[float, tuple[tuple[str, int], ...]] = (-PROCESSES_S, ())
        self._memory = 0  # of them, then

    def head(self) -> str:
        """HOST:PORT of this node, where the parts of the server may meet."""
        return f"{self._host}:{free_port(self._host)}"

    def launch(self, rank: int = 0, head: str = "", *, again: bool = False) -> None:
        """Start the processes of part `rank`. `again`: in the place of a server that was lost, whose GPUs may not be free yet."""
        config, device, engine = self._config, self._config.cluster.device, self._config.rollout.engine
        port, self._first = free_port(self._host), rank == 0
        arguments = server_args(
            config.model.path,
            engine,
            device=device,
            dtype=config.model.dtype_on(device),
            port=port,
            seed=self._seed,
            host=self._host,
            routed_experts=self._routed_experts,
            shared_expert=self._shared_expert,
            memory_saver=bool(self._gpus) and config.weights.servers_sleep,
            quantised=config.weights.quantization is not None,
            part=Part(rank, head),
        )
        if device != "cpu" and sees_gpu():  # without a driver there is nothing to compile for, and the server says so
            check_toolkit()
        hidden_size = hidden_size_in(config.model.path)
        environment = server_env(engine, device=device, gpus=self._gpus, alone=config.servers_alone, hidden_size=hidden_size)
        environment |= node_environment(device, self._host, os.environ | environment)
        if not os.environ.get("SGLANG_HOST_IP"):  # else a server on several nodes takes the address of its node's first interface
            environment["SGLANG_HOST_IP"] = self._host
        print(log_line("server", device, os.environ | environment), flush=True)
        if device == "cuda" and config.weights.quantization is not None:
            check_fp8(visible_gpus(os.environ | environment))
        if again and device == "cuda":
            wait_for_gpus(os.environ | environment)
        self._launched = SGLangServer(
            arguments,
            url=f"http://{self._host}:{port}",
            api_key=self._api_key,
            log=self._log,
            env=environment,
            nursery=self._nursery,
        )

    @property
    def _server(self) -> SGLangServer:
        """The server. Raises EngineError before `launch`."""
        if self._launched is None:
            raise EngineError(f"the server whose log is {self._log} was not launched")
        return self._launched

    def start(self) -> str:
        """The server's URL, once it answers; after `launch`.

        Raises EngineError when it does not within its section's start_timeout_s.
        """
        server = self._server
        server.wait_healthy(self._config.rollout.engine.start_timeout_s, self._section)
        if self._first:
            self._probe = Probe(RequestThread(self._api_key), server.url)
        return server.url

    def watch(self) -> None:
        """Return when the actor is closed. Raises ProcessDied as soon as the server has died."""
        server = self._server
        while not self._closed.wait(POLL_S):
            if not server.alive() and not self._closed.is_set():
                raise ProcessDied(f"the SGLang server {server.end}\n{server.log_tail()}")

    def pulse(self) -> Pulse:
        """The server's processes, and how often its scheduler has answered. Asked every two seconds, in a thread of its own."""
        now = time.monotonic()
        if self._launched is not None and now - self._processes[0] > PROCESSES_S:
            self._processes = (now, names_of_group(self._launched.pid))
            self._memory = resident(pid for _, pid in self._processes[1])
        probe = self._probe
        node = ray.get_runtime_context().get_node_id()
        return Pulse(
            os.getpid(), node, processes=self._processes[1], beats=0 if probe is None else probe.turn(), memory=self._memory
        )

    def close(self) -> None:
        """End the server; nothing of it is left afterwards. Safe to call twice."""
        self._closed.set()
        if self._probe is not None:
            probe, self._probe = self._probe, None
            probe.close()
        if self._launched is not None:
            self._launched.stop(GPU_END_TIMEOUT_S if self._config.cluster.device == "cuda" else 0.0)
