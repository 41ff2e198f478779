"""`ctpo plan --simulate`: steps per hour and where time goes, from a run of the real loop on a virtual clock."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import ConfigError, CtpoError, storing
from ctpo_megatron.jobs.plan import WIDTH, find_model_config, plain_table, plan_of, read_planned
from ctpo_megatron.jobs.topology import planned_run
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.flops import attention_weight
from ctpo_megatron.planning.plan import Hardware
from ctpo_megatron.simulation.account import Account, account, steps_to_simulate
from ctpo_megatron.simulation.calibrate import measured, overlaps
from ctpo_megatron.simulation.options import SimulationOptions
from ctpo_megatron.simulation.roofline import TOOL_S, Peaks, roofline
from ctpo_megatron.simulation.run import Simulated, Troubles, simulate
from ctpo_megatron.simulation.speeds import Speeds
from ctpo_megatron.simulation.workload import LogNormal, Workload, read_recorded

TOOL_ON_CPU_S = 0.015  # of a call of the Python tool, see `rollout.sandbox`
MOST_SPLITS = 8  # that are simulated
SHOWN = 60  # characters of why a split cannot be
TRAINER = {"rollout": "trainer waits for rollouts", "train": "trains", "publish": "waits for the publication"}
SERVERS = {
    "decode": "servers decode",
    "prefill": "servers read prompts",
    "paused": "servers are paused",
    "idle": "servers are idle",
}


@dataclass(frozen=True, slots=True)
class Split:
    """GPUs of the trainer and of the servers, and what came of a run with them; None: why there is none."""

    dp: int
    trainer: int
    servers: int
    made: Account | None
    why: str = ""


def simulate_job(
    config: RunConfig,
    where: Path,
    model_config: Path | None,
    hardware: Hardware,
    options: SimulationOptions,
    console: Console | None = None,
) -> None:
    """Print a simulation of `config`, read from the file `where`. Raises ConfigError for what cannot be simulated."""
    shape, _ = read_planned(config, find_model_config(config, where, model_config))
    speeds, workload = speeds_of(config, shape, hardware, options), workload_of(config, options)
    made, steady = simulated(config, shape, speeds, workload, options)
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(_headline(config, speeds, options), "")
    for table in (_time(steady), _controller(made, steady)):
        console.print(table, "")
    splits = list(other_splits(config, shape, hardware, workload, options)) if options.splits else []
    if splits:
        console.print(_splits([_own(config, steady), *splits]), "")
    if options.json_file is not None:
        _write(Path(options.json_file), speeds, made, steady, splits)


def speeds_of(config: RunConfig, shape: ModelShape, hardware: Hardware, options: SimulationOptions) -> Speeds:
    """Returns the speeds that `options` ask for: measured in a run, or computed. Raises ConfigError."""
    on_cpu = config.cluster.device == "cpu"
    if options.run is not None:
        if options.cores is not None and overlaps(Path(options.run)):
            raise ConfigError(
                f"--with cores={options.cores:g}: in {options.run} rollouts and training went on at the same time, so its speeds "
                "hold already what each cost the other, and it would count twice. Measure in a run of train.staleness=0, or "
                "leave cores out and predict runs like that one"
            )
        found = measured(
            Path(options.run),
            dp=config.parallel.dp,
            attention=attention_weight(shape),
            first=options.first,
            warm_up=options.warm_up,
        )
        tool_s = options.tool_s if options.tool_s is not None else TOOL_ON_CPU_S if on_cpu else TOOL_S
        tool_s = 0.0 if config.rollout.code_tool is None else tool_s
        slots = (os.cpu_count() or 1) if on_cpu else found.tool_slots
        busy = options.trainer_cores or options.cores or found.trainer_cores
        return replace(found, cores=options.cores, trainer_cores=busy, tool_s=tool_s, tool_slots=slots)
    if on_cpu:
        raise ConfigError(
            "cluster.device is cpu: how fast a run is on CPUs is measured, not computed. Give --with run=RUN_DIR, a run of this "
            "model on this machine."
        )
    peaks = Peaks(options.teraflops, options.terabytes_s, options.gigabytes_s, options.trained, options.decoded)
    speeds = roofline(planned_run(config), shape, plan_of(config, shape, hardware), peaks)
    return speeds if options.tool_s is None else replace(speeds, tool_s=options.tool_s)


def workload_of(config: RunConfig, options: SimulationOptions) -> Workload:
    """Returns what attempts say. Raises ConfigError for a directory without trajectories."""
    prompt = options.prompt_tokens or max(1, config.data.max_prompt_tokens // 4)
    recorded = options.lengths or (options.run if options.mean is None else None)
    if recorded is not None:
        return read_recorded(Path(recorded), prompt, options.seed)
    mean = options.mean or config.rollout.max_response_tokens / 4
    return LogNormal(mean, options.sigma, prompt, options.calls, seed=options.seed)


def simulated(
    config: RunConfig, shape: ModelShape, speeds: Speeds, workload: Workload, options: SimulationOptions
) -> tuple[Simulated, Account]:
    """Returns a simulated run, and the account of its steady steps."""
    steps, first, last = steps_to_simulate(config, options.steps)
    mtbf_s = None if options.mtbf_hours is None else 3600 * options.mtbf_hours
    weight = attention_weight(shape) if config.train.balance == "flops" else 0.0
    troubles = Troubles(mtbf_s, options.failing)
    made = simulate(config, speeds, workload, steps=steps, troubles=troubles, seed=options.seed, attention_weight=weight)
    return made, account(made, first, last)


def other_splits(
    config: RunConfig, shape: ModelShape, hardware: Hardware, workload: Workload, options: SimulationOptions
) -> Iterator[Split]:
    """Yields what as many GPUs would do, were they shared out otherwise between data-parallel replicas and servers."""
    plan = plan_of(config, shape, hardware)
    if config.cluster.device == "cpu" or not plan.server_gpus:
        return
    total, replica, server = (
        plan.trainer_gpus + plan.server_gpus,
        plan.trainer_gpus // config.parallel.dp,
        config.rollout.engine.tp,
    )
    sizes = [dp for dp in range(1, total // replica + 1) if total - dp * replica >= server and dp != config.parallel.dp]
    nearest = sorted(sizes, key=lambda dp: max(dp / config.parallel.dp, config.parallel.dp / dp))[:MOST_SPLITS]
    for dp in sorted(nearest):
        servers = (total - dp * replica) // server
        try:
            changed = _with_split(config, dp, servers)
            check_layout(shape, changed.parallel)
            problems = plan_of(changed, shape, hardware).problems
            if problems:
                raise ConfigError(problems[0])
            speeds = speeds_of(changed, shape, hardware, options)
            _, steady = simulated(changed, shape, speeds, workload, options)
        except (CtpoError, ValidationError) as error:
            yield Split(dp, dp * replica, servers * server, None, _reason(error))
            continue
        yield Split(dp, dp * replica, servers * server, steady)


def _reason(error: CtpoError | ValidationError) -> str:
    """Why a split cannot be, in one line."""
    text = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
    return text.removeprefix("Value error, ").partition("\n")[0]


def _with_split(config: RunConfig, dp: int, servers: int) -> RunConfig:
    values = config.model_dump(exclude={"elastic"})
    values["parallel"]["dp"] = dp
    values["rollout"]["engine"]["servers"] = servers
    return RunConfig.model_validate(values)


def _own(config: RunConfig, steady: Account) -> Split:
    engine = config.rollout.engine
    return Split(config.parallel.dp, config.parallel.world_size, engine.servers * engine.tp, steady, "this configuration")


def _headline(config: RunConfig, speeds: Speeds, options: SimulationOptions) -> Text:
    text = Text(f"Simulation of {config.name} on a virtual clock", style="bold")
    lengths = options.lengths or (options.run if options.mean is None else None)
    told = f"lengths of {lengths}" if lengths is not None else f"log-normal lengths, sigma {options.sigma:g}"
    return text.append(f"\nspeeds {speeds.source}; {told}; seed {options.seed}", style="dim not bold")


def _time(made: Account) -> Table:
    table = plain_table("A steady step", "seconds", "share", right=True)
    for phase, words in TRAINER.items():
        table.add_row(words, f"{made.phases[phase]:,.2f}", f"{made.phases[phase] / made.step_s:.0%}")
    table.add_row("together", f"{made.step_s:,.2f}", f"{made.steps_per_hour:,.1f} steps per hour", style="bold")
    table.add_row("of the rollout, after 80 % of its groups", f"{made.tail_s:,.2f}", f"{made.tail_s / made.step_s:.0%}")
    for what, words in SERVERS.items():
        table.add_row(words, f"{made.servers[what] * made.step_s:,.2f}", f"{made.servers[what]:.0%}")
    return table


def _controller(run: Simulated, made: Account) -> Table:
    table = plain_table("Trajectories", "", right=True)
    table.add_row("per second", f"{made.trajectories_s:,.2f}")
    table.add_row("in flight, at most", f"{run.most_in_flight:,} of {run.most_open:,} open")
    table.add_row("running at a server", f"{made.running:,.1f}")
    table.add_row("tokens per second and server", f"{made.server_tokens_s:,.0f}")
    table.add_row("staleness of a token, mean and largest", f"{made.staleness_mean:.2f}, {made.staleness_max:.0f}")
    if run.failures:
        table.add_row("servers that died", f"{run.failures:,}")
    table.add_row("CPU of the controller, each", f"{made.controller_ms:.2f} ms")
    table.add_row("CPU of the whole simulation", f"{run.controller_s + run.simulation_s:,.1f} s for {run.trajectories:,}")
    return table


def _splits(splits: list[Split]) -> Table:
    best = max((each.made.steps_per_hour for each in splits if each.made is not None), default=0.0)
    table = plain_table("Trainer GPUs", "dp", "servers' GPUs", "steps per hour", "trainer waits", "servers idle", right=True)
    table.add_column("")
    for each in sorted(splits, key=lambda split: split.trainer):
        if each.made is None:
            table.add_row(str(each.trainer), str(each.dp), str(each.servers), "", "", "", each.why[:SHOWN])
            continue
        made, is_best = each.made, each.made.steps_per_hour == best
        words = ", ".join(filter(None, (each.why, "the most" if is_best else "")))
        numbers = (f"{made.steps_per_hour:,.2f}", f"{made.bubble:.0%}", f"{made.servers['idle']:.0%}", words)
        table.add_row(str(each.trainer), str(each.dp), str(each.servers), *numbers, style="bold" if is_best else "")
    return table


def _write(path: Path, speeds: Speeds, made: Simulated, steady: Account, splits: list[Split]) -> None:
    found = {
        "speeds": speeds.as_json(),
        "steady": steady.as_json(),
        "steps": [{"step": each.step, "seconds": each.seconds, "phases": each.phases} for each in made.steps],
        "trajectories": made.trajectories,
        "most_in_flight": made.most_in_flight,
        "controller_s": made.controller_s,
        "simulation_s": made.simulation_s,
        "ledger": made.ledger,
        "splits": [
            {"dp": each.dp, "trainer": each.trainer, "servers": each.servers, "made": each.made and each.made.as_json()}
            for each in splits
        ],
    }
    with storing(path):
        path.write_text(json.dumps(found, indent=2), encoding="utf-8")
