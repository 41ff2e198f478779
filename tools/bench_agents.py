"""What the agents' endpoint costs: episodes of two turns at once, from clients in another process, with restarts in mid-run.

    .venv/bin/python tools/bench_agents.py --episodes 500 --turn-s 5 --out runs/bench_agents.json

No model runs: a scripted attempt takes `--turn-s` for each turn, and its client takes as long between them. Three rounds: calm;
with two restarts of the server, which cut off what is in flight; and beside clients that are silent, slow or wrong, in a third
process. Each tells CPU seconds of the endpoint's process, as a share of a core and by request, and by how much answers came later
than the script says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_agents_clients import Order, parts, play_all
from scripted_episode import ScriptedEpisode, scripted_answer

from ctpo_megatron.agents.http.keys import KeyedEpisodes, new_key
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.protocols import ToolCall

ROUNDS = ("calm", "restart", "beside others")
RESTARTS = (0.75, 2.6)  # turns after the begin, and after the one before: when most wait for their first, and second, answer
PROBE_S = 0.02
ANSWER = "The answer is 42. " * 12
CALL = ToolCall("call_1", "python", '{"code": "print(6 * 7)"}')


async def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A round: its episodes, served here and played by another process."""
    episodes = KeyedEpisodes()
    attempts = {new_key(): _episode(options.turn_s) for _ in range(options.episodes)}
    for key, episode in attempts.items():
        episodes.add(key, episode)
    async with AgentServer(episodes) as server:
        order = Order([*attempts], server.port, options.turn_s, options.system_characters, rude=False)
        processes = [await _clients(order)]
        if name == ROUNDS[2]:
            rude = new_key()
            episodes.add(rude, _episode(options.turn_s))
            processes.append(await _clients(replace(order, keys=[rude], rude=True)))
        probe = asyncio.ensure_future(_delays())
        begun, cpu = time.perf_counter(), time.process_time()
        for _, stdin, _ in processes:
            stdin.write(b"go\n")
        if name == ROUNDS[1]:
            for turns in RESTARTS:
                await asyncio.sleep(turns * options.turn_s)
                await server.restart()
        said = json.loads(await processes[0][2].readline())
        seconds, used = time.perf_counter() - begun, time.process_time() - cpu
        probe.cancel()
        for process, stdin, _ in processes:
            stdin.close()
            await process.wait()
        counts = server.counts
    requests = counts.answered + counts.refused
    return {
        "round": name,
        "episodes": len(attempts),
        "lost": len(attempts) - sum(each.sampled == 2 for each in attempts.values()) + said["failed"],
        "seconds": seconds,
        "requests": requests,
        "requests_per_s": requests / seconds,
        "cpu_share": used / seconds,
        "cpu_ms_per_request": 1000 * used / requests,
        "repeated": counts.retries,
        "cut": counts.cut,
        "refused": counts.refused,
        "later_ms": said["later_ms"],
        "loop_later_ms": await probe,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


async def _delays() -> dict[str, float]:
    """By how many milliseconds the endpoint's loop woke late, until it is cancelled: what one client may cost all others."""
    late: list[float] = []
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(PROBE_S)
            late.append(1000 * (time.perf_counter() - begun - PROBE_S))
    return parts(late)


async def _clients(order: Order) -> tuple[asyncio.subprocess.Process, asyncio.StreamWriter, asyncio.StreamReader]:
    """A process that is ready to follow `order`, with what it reads and writes."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, "--clients", stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(order.told()).encode() + b"\n")
    await process.stdout.readline()
    return process, process.stdin, process.stdout


def _episode(turn_s: float) -> ScriptedEpisode:
    return ScriptedEpisode([scripted_answer(None, CALL, reasoning="I compute. " * 20), scripted_answer(ANSWER)], takes_s=turn_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--turn-s", type=float, default=5.0, help="seconds that a turn takes to be sampled, and a tool to run")
    parser.add_argument("--system-characters", type=int, default=2000, help="of the system prompt")
    parser.add_argument("--rounds", nargs="+", choices=ROUNDS, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--clients", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients:
        play_all()
        return
    results = []
    for name in options.rounds:
        results.append(asyncio.run(measured(name, options)))
        print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if any(each["lost"] for each in results):
        sys.exit("episodes were lost")


if __name__ == "__main__":
    main()
