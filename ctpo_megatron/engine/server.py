"""One SGLang server as a child process: its arguments, its start, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.config.rollout import CPU_KV_TOKENS, EngineConfig
from ctpo_megatron.engine.processes import (
    adopt_orphans,
    end_group,
    group_rss_bytes,
    group_shared_memory,
    reap_group,
    unlink_shared_memory,
)
from ctpo_megatron.errors import EngineError

_CPU_ARGUMENTS = (
    *("--attention-backend", "torch_batched", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    "--disable-overlap-schedule",
    "--sleep-on-idle",  # schedulers that have nothing to do would otherwise poll, on cores that the trainer needs
)


@dataclass(frozen=True, slots=True)
class Part:
    """The processes of a server on one of its nodes. The first one answers requests; all meet at `head`, HOST:PORT there."""

    rank: int = 0
    head: str = ""


def server_args(
    model_path: str | Path,
    engine: EngineConfig,
    *,
    device: str,
    dtype: str,
    port: int,
    seed: int,
    host: str = "127.0.0.1",
    routed_experts: bool = False,
    memory_saver: bool = False,
    part: Part = Part(),
) -> list[str]:
    """Arguments of one server, as `sglang.launch_server` takes them. `engine.extra_args` come last and so win.

    `routed_experts`: requests may ask for the experts that each token went to. SGLang refuses to start a dense model with it.
    `memory_saver`: it can give back its GPUs' memory; on a CPU it always can. `part`: of a server on `engine.nodes` nodes.
    The weights it loads are version 0. It speaks token ids only, so it needs no tokenizer; and no grammar is ever asked for.
    """
    arguments = ["--model-path", str(model_path), "--host", host, "--port", str(port)]
    arguments += ["--device", device, "--dtype", dtype, "--tp-size", str(engine.tp), "--random-seed", str(seed)]
    arguments += ["--weight-version", "0", "--skip-tokenizer-init", "--grammar-backend", "none", "--skip-server-warmup"]
    arguments += ["--log-level-http", "warning"]  # not a line per request
    if device == "cpu":
        arguments += _CPU_ARGUMENTS
    if engine.nodes > 1:
        arguments += ["--nnodes", str(engine.nodes), "--node-rank", str(part.rank), "--dist-init-addr", part.head]
    if routed_experts:
        arguments += ["--enable-return-routed-experts"]
    if memory_saver:
        arguments += ["--enable-memory-saver"]
    kv_tokens = engine.max_total_tokens or (CPU_KV_TOKENS if device == "cpu" else None)
    if kv_tokens is not None:
        arguments += ["--max-total-tokens", str(kv_tokens)]
    return [*arguments, *engine.extra_args]


def server_env(engine: EngineConfig, *, device: str, gpus: Sequence[str] = ()) -> dict[str, str]:
    """Variables that SGLang, CUDA and OpenMP read and have no argument for; to be added to the parent's.

    `gpus` are the trainer's that the server shall see, by CUDA's names; it uses the first ones. Empty: it has its own.
    """
    if gpus:  # the check would refuse them: a stage of the trainer's pipeline may need more than another one
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false"}
    if device != "cpu":
        return {}
    cores = sorted(os.sched_getaffinity(0))
    ranks = engine.tp * engine.servers
    # Half of the cores: the other half is for the trainer. Threads that wait must sleep: spinning on a busy core made
    # generation twenty times slower.
    env = {"OMP_NUM_THREADS": str(max(1, len(cores) // ranks // 2)), "OMP_WAIT_POLICY": "passive"}
    env["THP_MEM_ALLOC_ENABLE"] = "1"  # torch's: buckets of weights come in large pages; small ones cost more than the transport
    # glibc's: what a bucket of weights lay in stays with the process, as new memory costs more than receiving and loading it
    env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    if engine.tp > 1:  # without it SGLang wants one NUMA node per rank
        here = engine.tp_per_node
        share = max(1, len(cores) // here)
        shares = [cores[rank * share : (rank + 1) * share] or [cores[rank % len(cores)]] for rank in range(here)]
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, each)) for each in shares * engine.nodes)
    return env


def new_api_key() -> str:
    """A key for one run."""
    return secrets.token_urlsafe(32)


class SGLangServer:
    """Starts on construction. The process group ends with `stop()`, or when this process ends for whatever reason.

    `arguments` come from `server_args`; `env` is added to this process's environment; `log` receives all output.
    """

    def __init__(self, arguments: list[str], *, url: str, api_key: str, log: Path, env: dict[str, str] | None = None) -> None:
        self.url = url
        self.log = log
        self._segments: set[str] = set()
        adopt_orphans()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ctpo_megatron.engine.sglang.entry", *arguments],
                stdin=subprocess.PIPE,  # carries the key, then stays open as the sign that this process lives
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | (env or {}),
            )
        with contextlib.suppress(BrokenPipeError):  # it has died already; wait_healthy tells with its exit code and log
            self._process.stdin.write(f"{api_key}\n".encode())
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        """Process id, which is also its process group."""
        return self._process.pid

    def wait_healthy(self, timeout_s: float) -> None:
        """Until the server answers a health check, which generates a token.

        Raises EngineError, with the end of the log, when the process ends first or `timeout_s` is over; nothing is left then.
        """
        deadline = time.monotonic() + timeout_s
        while not self._healthy():
            if not self.alive():
                code = self.exit_code
                self.stop()
                raise EngineError(f"SGLang server {self.url} ended with exit code {code} while starting.\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise EngineError(
                    f"SGLang server {self.url} was not ready after {timeout_s:.0f} s; "
                    f"raise rollout.engine.start_timeout_s if it only needs longer.\n{self.log_tail()}"
                )
            time.sleep(0.1)
        self._segments = group_shared_memory(self.pid)

    def alive(self) -> bool:
        """Whether the server's main process runs; it takes its children down with it, and they it."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the main process; negative: the signal that ended it; None: it runs."""
        return self._process.poll()

    def rss_bytes(self) -> int:
        """Resident memory of all its processes; shared pages count once per process."""
        return group_rss_bytes(self.pid)

    def stop(self, grace_s: float = 0.0) -> None:
        """End all its processes and remove their shared memory. Safe to call again.

        `grace_s`: how long SGLang may take to end by itself (on GPUs it then gives memory back in order).
        Raises EngineError when a process survives SIGKILL.
        """
        if grace_s > 0 and self.alive():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        left = end_group(self.pid)
        unlink_shared_memory(self._segments)  # of those that had died before
        self._process.wait(10)
        reap_group(self.pid)
        self._process.stdin.close()
        if left:
            raise EngineError(f"processes {left} of the SGLang server {self.url} survived SIGKILL; its log: {self.log}")

    def log_tail(self, lines: int = 20) -> str:
        """The end of the log, with its path, for an error message."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"The last lines of {self.log}:", *(f"  {line}" for line in text[-lines:])])

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            return False  # not listening yet, or still loading
