"""A whole run on the virtual clock: the parts put together, and what came of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ctpo_megatron.config import RunConfig
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.traffic import Traffic
from ctpo_megatron.loop.admission import Admission
from ctpo_megatron.loop.evaluation.evaluate import Evaluator
from ctpo_megatron.loop.evaluation.evaluations import Evaluations
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.report import RunTotals
from ctpo_megatron.loop.train import TrainLoop
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.simulation.clock import run_virtually
from ctpo_megatron.simulation.engine import ServerLoads, SimulatedEngine
from ctpo_megatron.simulation.host import Host
from ctpo_megatron.simulation.meter import Meter
from ctpo_megatron.simulation.numbers import CountingLedger, NobodyGrades, NumbersOnly, Step, silent
from ctpo_megatron.simulation.players import Book, ScriptedEnvironment, ScriptedReward, TimedTool
from ctpo_megatron.simulation.publisher import Failures, SimulatedPublisher
from ctpo_megatron.simulation.server import SimulatedServer
from ctpo_megatron.simulation.speeds import Speeds
from ctpo_megatron.simulation.trainer import SimulatedTrainer, counted_batches
from ctpo_megatron.simulation.workload import Workload


@dataclass(frozen=True, slots=True)
class Troubles:
    """What goes wrong. `mtbf_s`: mean seconds of a server's life; None: they live. `failing`: share of tries at an attempt."""

    mtbf_s: float | None = None
    failing: float = 0.0


@dataclass(slots=True)
class Simulated:
    """What came of a simulated run."""

    steps: list[Step]
    trajectories: int  # that were trained on
    sampled: int  # tokens that servers sampled
    ended: float  # virtual seconds
    controller_s: float  # CPU seconds of the controller
    simulation_s: float  # CPU seconds of what stands in for servers and trainer
    most_in_flight: int  # attempts that servers were asked for at a time
    most_open: int  # attempts of groups that were open at a time
    servers: int
    failures: int  # of servers
    left: int  # requests that nobody answered, when the run was over
    unbalanced: list[str]  # of the ledger
    ledger: dict[str, object]


def simulated_config(config: RunConfig, steps: int) -> RunConfig:
    """Returns `config` for a simulation of `steps` training steps: without checkpoints and evaluations."""
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def simulate(
    config: RunConfig,
    speeds: Speeds,
    workload: Workload,
    *,
    steps: int,
    troubles: Troubles = Troubles(),
    seed: int = 0,
    attention_weight: float = 0.0,
) -> Simulated:
    """Returns what came of `steps` training steps of `config`, on a virtual clock. The same arguments give the same steps.

    `attention_weight`: the model's, see `loop.train.make_batches`. Raises what a run raises, as RolloutError where too many
    attempts fail, and NothingLeft where all wait for each other.
    """
    return run_virtually(_simulate(simulated_config(config, steps), speeds, workload, troubles, seed, attention_weight))


async def _simulate(
    config: RunConfig, speeds: Speeds, workload: Workload, troubles: Troubles, seed: int, attention_weight: float
) -> Simulated:
    meter, host = Meter(), Host(speeds.cores)
    with meter:
        names = [f"server {number}" for number in range(config.rollout.engine.servers)]
        servers = {name: SimulatedServer(name, speeds.server, host, meter) for name in names}
        record, ledger = NumbersOnly(servers), CountingLedger()
    fleet = _fleet(config, names)
    traffic = Traffic(config.rollout.engine.traffic, fleet, ServerLoads(servers), most=config.rollout.concurrency)
    book = Book()
    engine = SimulatedEngine(fleet, traffic, servers, book)
    reward, tool = ScriptedReward(book, troubles.failing, seed), TimedTool(speeds, host)
    environment = ScriptedEnvironment(engine, tool, reward, workload, book, config.rollout.group_size, meter)
    publisher = SimulatedPublisher(fleet, servers, speeds, sleeping=config.weights.shares_devices)
    trainer = SimulatedTrainer(config, speeds, host, meter, attention_weight)
    admission = Admission(PromptSampler(workload.prompts(), seed))
    loop = _loop(config, admission, Rollouter(environment, config.rollout), trainer, publisher, record, ledger)
    await publisher.publish(0)
    failures = Failures(fleet, servers, speeds, troubles.mtbf_s, seed)
    async with traffic.watched(), failures.happening():
        await loop.run()
    await asyncio.sleep(0)  # attempts that were cancelled leave their servers
    loads = [server.load() for server in servers.values()]
    return Simulated(
        steps=record.steps,
        trajectories=sum(step.trajectories for step in record.steps),
        sampled=round(sum(server.used.tokens for server in servers.values())),
        ended=asyncio.get_running_loop().time(),
        controller_s=meter.controller_s,
        simulation_s=meter.simulated_s,
        most_in_flight=engine.most_in_flight,
        most_open=ledger.most_open * config.rollout.group_size,
        servers=len(servers),
        failures=failures.count,
        left=engine.in_flight + sum(load.running + load.waiting for load in loads),
        unbalanced=ledger.unbalanced(),
        ledger=ledger.summary(),
    )


def _fleet(config: RunConfig, names: list[str]) -> Fleet:
    engine = config.rollout.engine
    fleet = Fleet(patience_s=config.absence_s(), restarts=engine.restarts)
    for name in names:
        fleet.join(name, name, engine.tp)
    return fleet


def _loop(
    config: RunConfig,
    admission: Admission,
    rollouts: Rollouter,
    trainer: SimulatedTrainer,
    publisher: SimulatedPublisher,
    record: NumbersOnly,
    ledger: Ledger,
) -> TrainLoop:
    """The loop as it is, over the parts that only take time."""
    totals = RunTotals()
    nothing = Evaluations([], config.train.steps, Evaluator(rollouts, NobodyGrades(), config.seed), record, totals)
    return TrainLoop(
        config=config,
        admission=admission,
        rollouts=rollouts,
        trainer=trainer,
        publisher=publisher,
        record=record,
        evaluations=nothing,
        ledger=ledger,
        batches_of=counted_batches,
        progress=silent,
        totals=totals,
        emit=record.heard,
    )
