"""Ranks of a trainer as processes of this machine, without Ray: for work that is done once and then over."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from ctpo_megatron.cluster.allocator import keep_memory
from ctpo_megatron.cluster.environment import node_environment
from ctpo_megatron.cluster.threads import set_threads, threads_per_rank
from ctpo_megatron.errors import CtpoError, ProcessDied
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.ports import free_port

HOST = "127.0.0.1"
PEERS_FAIL_WITHIN_S = 3.0  # after one rank has failed; one of its peers may know more about the cause
END_S = 5.0


def run_local_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
    """What `function(RankInfo, *args)` returned in each of `world_size` new processes, by rank.

    It must be a module's own function. Raises what a rank raised, as soon as one fails, and ProcessDied for one that ended
    without an answer, or has none after `timeout_s`. No process is left behind.
    """
    context = mp.get_context("spawn")
    port, threads = free_port(HOST), threads_per_rank(world_size)
    ends: list[Connection] = []
    processes: list[SpawnProcess] = []
    try:
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            info = RankInfo(rank, world_size, HOST, port)
            process = context.Process(target=_rank, args=(theirs, threads, info, function, args), daemon=True)
            process.start()
            theirs.close()  # so that a death shows as the end of the pipe
            ends.append(mine)
            processes.append(process)
        return _answers(ends, processes, timeout_s)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join(END_S)
            if process.is_alive():
                process.kill()
                process.join()


def _answers(ends: list[Connection], processes: list[SpawnProcess], timeout_s: float | None) -> list[Any]:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    errors: list[BaseException] = []
    open_ends = {end: rank for rank, end in enumerate(ends)}
    while open_ends:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready = wait(list(open_ends), timeout=PEERS_FAIL_WITHIN_S if errors else left)
        if not ready and not errors:
            raise ProcessDied(f"ranks {sorted(open_ends.values())} gave no answer within {timeout_s:g} s")
        if not ready:
            break
        for end in [each for each in open_ends if each in ready]:
            rank = open_ends.pop(end)
            result: Any
            try:
                ok, result = end.recv()
            except EOFError:
                processes[rank].join(END_S)
                ok, result = False, ProcessDied(f"rank {rank} ended with exit code {processes[rank].exitcode} and no answer")
            if ok:
                results[rank] = result
            else:
                errors.append(result)
        if errors and any(_is_told(error) for error in errors):
            break
    if errors:
        raise next((error for error in errors if _is_told(error)), errors[0])
    return [results[rank] for rank in range(len(ends))]


def _is_told(error: BaseException) -> bool:
    """One that a person can act on, not a process that is gone."""
    return isinstance(error, CtpoError) and not isinstance(error, ProcessDied)


def _rank(answer: Connection, threads: int, info: RankInfo, function: Callable[..., Any], args: tuple) -> None:
    keep_memory()
    set_threads(threads)
    os.environ |= node_environment("cpu", info.master_addr, os.environ)
    try:
        answer.send((True, function(info, *args)))
    except CtpoError as error:
        answer.send((False, error))
    except BaseException as error:  # noqa: BLE001 - raised again by the parent
        died = ProcessDied(f"rank {info.rank} failed: {type(error).__name__}: {error}")
        died.add_note(traceback.format_exc())  # shown with --debug
        answer.send((False, died))
