"""Start N processes that run one function as the ranks of a trainer on this machine, with a bound on the time."""

from __future__ import annotations

import inspect
import multiprocessing as mp
import os
import pickle
import queue
import runpy
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ctpo_megatron import ports
from ctpo_megatron.mcore.rank import RankInfo

THREADS = 1  # per rank; the machines that run these tests have two cores
WORKERS = 16  # of pytest-xdist, at most; more may get the same port
_GIVEN: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now, another one each time: many are taken before the first is used.

    Processes that test at the same time have ports of their own, for the same reason.
    """
    mine = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    while (port := ports.free_port("127.0.0.1")) in _GIVEN or port % WORKERS != mine:
        continue
    _GIVEN.add(port)
    return port


def at_own_port(rank: RankInfo) -> RankInfo:
    """A rank by itself can take any port for its next engine, and has to, as its last engine's is not free at once."""
    return replace(rank, master_port=free_port()) if rank.world_size == 1 else rank


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 400.0, bare: bool = False
) -> list[Any]:
    """`function(RankInfo, *args)` in `world_size` processes; what they returned, in rank order.

    They are forked from a process that is ready for megatron on a CPU (`preload`); `bare` ones start new, with nothing imported.
    Raises RuntimeError with the traceback of the first rank that failed, TimeoutError when they take longer than `timeout_s`.
    No process is left behind.
    """
    context = mp.get_context("spawn" if bare else "forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    # by file and name: a test module is not importable by name in a new process
    where = (inspect.getfile(function), function.__name__)
    answers = context.Queue()
    port = free_port()
    ranks = [RankInfo(rank, world_size, "127.0.0.1", port) for rank in range(world_size)]
    processes = [context.Process(target=_rank, args=(answers, info, where, args), daemon=True) for info in ranks]
    for process in processes:
        process.start()
    try:
        return _collect(answers, processes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(answers: Any, processes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        try:
            rank, result, error = answers.get(timeout=1.0)
        except queue.Empty:
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"a rank ended with exit code {dead[0]} and no answer") from None
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks without an answer: {sorted(set(range(len(processes))) - results.keys())}") from None
            continue
        if error:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        results[rank] = pickle.loads(result)
    return [results[rank] for rank in range(len(processes))]


def _rank(answers: Any, info: RankInfo, where: tuple[str, str], args: tuple) -> None:
    import torch

    # Ranks that wait for each other wake each other thousands of times a second. Where there are more of them than cores, one
    # that is woken would at once take the core of the one that it waits for.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    torch.set_num_threads(THREADS)
    try:
        function = runpy.run_path(where[0])[where[1]]
        # pickled here, where what cannot be is an error; the queue would drop it
        answers.put((info.rank, pickle.dumps(function(info, *args)), None))
    except BaseException:  # noqa: BLE001 - the parent raises it again
        answers.put((info.rank, None, traceback.format_exc()))
