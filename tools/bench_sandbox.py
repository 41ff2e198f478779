"""How many programs the Python tool runs in a second, and how much longer each takes than in Python alone.

    python tools/bench_sandbox.py [--seconds 10] [--rate 50] [--endless 0.0]

Both are measured within one run, in turn, so that a busy host slows both. Closed: as many programs at a time as the tool allows.
Open: programs arrive at `--rate` a second, at random moments (the same ones for both), whether or not earlier ones have ended; a
program's time is counted from its arrival, so waiting for a place is part of it. `--endless`: a share of the programs that never
ends, each with a second of time, beside the others.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.rollout.sandbox.command import interpreter_words
from ctpo_megatron.rollout.sandbox.process import memory_file, readable
from ctpo_megatron.rollout.sandbox.python import BubblewrapPython

PROGRAM = "print(sum(i * i for i in range(100)))"
SAID = "328350"
ENDLESS = "while True: pass"
ENDLESS_S = 1.0
Run = Callable[[str], Awaitable[str]]


@dataclass(frozen=True)
class Times:
    """Seconds of each call, sorted, and of all together."""

    calls: list[float]
    wall_s: float
    cpu_s: float

    def at(self, share: float) -> float:
        """The milliseconds within which this share of the calls ended."""
        return 1e3 * self.calls[min(len(self.calls) - 1, int(share * len(self.calls)))]

    def told(self, name: str) -> str:
        """One line about them."""
        each = 1e3 * self.cpu_s / len(self.calls)
        return (
            f"  {name:8} {len(self.calls) / self.wall_s:6.1f} calls/s  p50 {self.at(0.5):6.1f}  p90 {self.at(0.9):6.1f}  "
            f"p99 {self.at(0.99):6.1f} ms  {each:5.1f} ms of CPU each"
        )


def sandboxed(config: PythonTool) -> Run:
    """The tool."""
    tool = BubblewrapPython(config)

    async def run(code: str) -> str:
        return (await tool.run(code)).output

    return run


def bare(config: PythonTool) -> Run:
    """The same interpreter with the same options, streams and number of programs at a time, but confined by nothing."""
    slots = asyncio.Semaphore(config.at_a_time)

    async def run(code: str) -> str:
        async with slots:
            with memory_file() as stdin, memory_file() as stdout:
                stdin.write(code.encode())
                stdin.seek(0)
                streams = [(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number, file in enumerate((stdin, stdout))]
                pid = os.posix_spawn(interpreter_words()[0], interpreter_words("-"), {}, file_actions=streams)
                await readable(os.pidfd_open(pid), 60.0, close=True)
                os.waitpid(pid, 0)
                stdout.seek(0)
                return stdout.read().decode().strip()

    return run


async def closed(run: Run, at_a_time: int, seconds: float) -> Times:
    """As many calls as can be made in so many seconds."""
    calls: list[float] = []
    begun, cpu = time.perf_counter(), _cpu_s()

    async def one_after_another() -> None:
        while time.perf_counter() < begun + seconds:
            start = time.perf_counter()
            assert await run(PROGRAM) == SAID
            calls.append(time.perf_counter() - start)

    await asyncio.gather(*(one_after_another() for _ in range(at_a_time)))
    return Times(sorted(calls), time.perf_counter() - begun, _cpu_s() - cpu)


async def arriving(run: Run, rate: float, seconds: float, endless: Run | None, share: float) -> Times:
    """Calls that arrive on their own; `endless` gets a share of further ones."""
    draw, moment, calls = random.Random(7), 0.0, list[float]()
    begun, cpu = time.perf_counter(), _cpu_s()

    async def arrive(at: float) -> None:
        await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
        assert await run(PROGRAM) == SAID
        calls.append(time.perf_counter() - begun - at)

    async with asyncio.TaskGroup() as group:
        while moment < seconds:
            group.create_task(arrive(moment))
            moment += draw.expovariate(rate)
            if endless is not None and draw.random() < share:
                group.create_task(_later(endless, begun + moment))
    return Times(sorted(calls), time.perf_counter() - begun, _cpu_s() - cpu)


async def _later(endless: Run, at: float) -> None:
    await asyncio.sleep(max(0.0, at - time.perf_counter()))
    await endless(ENDLESS)


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


async def measure(seconds: float, rate: float, share: float) -> None:
    """Print all."""
    config = PythonTool(timeout_s=30.0)
    ways = {"python": bare(config), "sandbox": sandboxed(config)}
    endless = sandboxed(PythonTool(timeout_s=ENDLESS_S)) if share else None
    for run in ways.values():
        await run(PROGRAM)
    print(f"{os.cpu_count()} CPUs, {config.at_a_time} programs at a time, load {os.getloadavg()[0]:.1f}")
    print(f"closed, {seconds:g} s each")
    made = {name: await closed(run, config.at_a_time, seconds) for name, run in ways.items()}
    for name, times in made.items():
        print(times.told(name))
    ratio = len(made["sandbox"].calls) / made["sandbox"].wall_s / (len(made["python"].calls) / made["python"].wall_s)
    print(f"  the sandbox runs {ratio:.2f} times as many")
    print(f"open, {rate:g} calls/s for {seconds:g} s" + (f", {share:.0%} endless ones besides" if share else ""))
    made = {name: await arriving(run, rate, seconds, endless, share) for name, run in ways.items()}
    for name, times in made.items():
        print(times.told(name))
    over = {p: made["sandbox"].at(p) - made["python"].at(p) for p in (0.5, 0.9, 0.99)}
    print("  beyond Python alone: " + ", ".join(f"p{100 * p:.0f} {ms:.1f} ms" for p, ms in over.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--endless", type=float, default=0.0)
    given = parser.parse_args()
    asyncio.run(measure(given.seconds, given.rate, given.endless))
