"""What the controller costs with 2,000 trajectories in flight at real servers, and whether its memory grows over 20,000.

    python tools/bench_controller.py                    10 minutes on two free cores, 4 GB of memory
    python tools/bench_controller.py --part memory      20,000 trajectories of 30 tokens, and what holds their memory
    python tools/bench_controller.py --part share       trajectories with a long tail, mean 250 tokens, for a minute and a half
    python tools/bench_controller.py --json found.json  the numbers as a file too

The controller is this process: feeding, collecting, requests, tokens to text, rewards, batches, journal, ledger and the record
of steps, by the parts that `ctpo train` puts together. Servers are real, of models whose lengths are known (`toy.chain`). Between
two steps they are given the next version without new weights. On a small machine servers are slow, and the controller's share of
a core is small with them; so its CPU time per trajectory and per token is told too, by what it goes to, and how many tokens per
second would take the bound. Ends with exit code 1 where a bound is missed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_controller_run import Controller, Plan, Reading
from rich.console import Console
from rich.table import Table

from ctpo_megatron.toy.chain import Chain

SHARE = 0.05  # of a core
GROWTH = 0.05  # of the controller's resident memory, from the half of all trajectories to their end
IN_FLIGHT = 2000
PLANS = {
    "memory": Plan(Chain(30), longest=256, steps=20, groups=125, staleness=8, kv_tokens=262_144),
    "share": Plan(Chain(250), longest=1024, steps=20, groups=125, staleness=8, kv_tokens=262_144, limit_s=90.0),
}


def judge(part: str, readings: list[Reading], in_flight: int) -> dict[str, Any]:
    """What was found in one part, and what of it misses its bound."""
    first, last = readings[0], readings[-1]
    wall, cpu = last.wall_s - first.wall_s, last.cpu_s - first.cpu_s
    ended, tokens = last.ended - first.ended, last.tokens - first.tokens
    shares = {phase: (last.phases.get(phase, 0) - first.phases.get(phase, 0)) for phase in last.phases}
    samples = sum(shares.values()) or 1
    found: dict[str, Any] = {
        "seconds": wall,
        "trajectories": ended,
        "tokens/s": tokens / wall,
        "share of a core": cpu / wall,
        "ms per trajectory": 1e3 * cpu / max(ended, 1),
        "us per token": 1e6 * cpu / max(tokens, 1),
        "tokens/s at the bound": SHARE * tokens / max(cpu, 1e-9),
        "phases": {phase: 1e3 * cpu * count / samples / max(ended, 1) for phase, count in shares.items()},
        "readings": [asdict(each) for each in readings],
    }
    missed = []
    if part == "share" and cpu / wall > SHARE:
        missed.append(f"the controller took {cpu / wall:.1%} of a core with {in_flight} in flight; wanted: under {SHARE:.0%}")
    if part == "memory":
        half = next((each for each in readings if each.ended >= last.ended / 2), last)
        found["growth"] = last.rss_mib / half.rss_mib - 1
        if found["growth"] > GROWTH:
            missed.append(f"its memory grew by {found['growth']:.1%} over the second half; wanted: at most {GROWTH:.0%}")
    return found | {"missed": missed}


def show(part: str, found: dict[str, Any]) -> None:
    """Print the figures of one part."""
    console = Console(width=140)
    table = Table(f"{part}: ended", "seconds", "CPU s", "RSS MiB", "records in memory")
    for each in found["readings"]:
        held = ", ".join(f"{name} {count}" for name, count in each["held"].items())
        table.add_row(str(each["ended"]), f"{each['wall_s']:.0f}", f"{each['cpu_s']:.1f}", f"{each['rss_mib']:.0f}", held)
    console.print(table)
    costs = Table("CPU time of the controller", "ms per trajectory")
    for phase, cost in sorted(found["phases"].items(), key=lambda each: -each[1]):
        costs.add_row(phase, f"{cost:.3f}")
    costs.add_row("all", f"{found['ms per trajectory']:.3f}")
    console.print(costs)
    console.print(
        f"{found['trajectories']} trajectories, {found['tokens/s']:,.0f} tokens/s: {found['share of a core']:.2%} of a core, "
        f"{found['us per token']:.2f} us per token; {SHARE:.0%} of a core would be {found['tokens/s at the bound']:,.0f} tokens/s"
    )
    if "growth" in found:
        console.print(f"memory over the second half: {found['growth']:+.2%}")


def main(
    part: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(PLANS)}; may be given more than once")] = None,
    in_flight: Annotated[int, typer.Option(help="trajectories", min=8)] = IN_FLIGHT,
    steps: Annotated[int, typer.Option(help="of 1,000 trajectories; 0: the part's own", min=0)] = 0,
    servers: Annotated[int, typer.Option(min=1)] = 1,
    trace: Annotated[bool, typer.Option(help="say which lines hold memory that the second half added; slow")] = False,
    file: Annotated[Path | None, typer.Option("--json", help="write the numbers here")] = None,
) -> None:
    """Measure the controller."""
    parts = part or list(PLANS)
    if unknown := set(parts) - set(PLANS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {', '.join(PLANS)}")
    found = {}
    for name in parts:
        with tempfile.TemporaryDirectory() as scratch:
            begun = time.monotonic()
            controller = Controller(PLANS[name], Path(scratch), in_flight=in_flight, servers=servers, steps=steps, trace=trace)
            found[name] = judge(name, asyncio.run(controller.run()), in_flight)
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        show(name, found[name])
    if file is not None:
        file.write_text(json.dumps(found, indent=2))
    missed = [sentence for each in found.values() for sentence in each["missed"]]
    print("\n".join(f"missed: {sentence}" for sentence in missed) or "all bounds hold")
    raise typer.Exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
