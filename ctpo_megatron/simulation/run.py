"""A whole run on the virtual clock: the parts put together, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ctpo_megatron.config import RunConfig
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.traffic import Traffic
from ctpo_megatron.loop.admission import Admission
from ctpo_megatron.loop.evaluation.evaluate import Evaluator
from ctpo_megatron.loop.evaluation.evaluations import Evaluations
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.report import RunTotals
from ctpo_megatron.loop.train import TrainLoop
from ctpo_megatron.record.events import Event, StepTrained
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.simulation.clock import run_virtually
from ctpo_megatron.simulation.engine import ServerLoads, SimulatedEngine
from ctpo_megatron.simulation.host import Host
from ctpo_megatron.simulation.meter import Meter
from ctpo_megatron.simulation.players import Book, ScriptedEnvironment, ScriptedReward, TimedTool
from ctpo_megatron.simulation.publisher import Failures, SimulatedPublisher
from ctpo_megatron.simulation.server import SimulatedServer, Used
from ctpo_megatron.simulation.speeds import Speeds
from ctpo_megatron.simulation.trainer import SimulatedTrainer, counted_batches
from ctpo_megatron.simulation.workload import Workload
from ctpo_megatron.types import TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Troubles:
    """What goes wrong. `mtbf_s`: mean seconds of a server's life; None: they live. `failing`: share of tries at an attempt."""

    mtbf_s: float | None = None
    failing: float = 0.0


@dataclass(slots=True)
class Step:
    """One training step. Seconds are virtual; `servers`: what all servers together had done by its end, since the beginning."""

    step: int
    ended: float
    metrics: dict[str, float]
    servers: Used
    trajectories: int
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    tail: float = 0.0


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
    unbalanced: list[str]  # of the ledger
    ledger: dict[str, object]


class NumbersOnly(RunRecord):
    """Keeps the numbers of each step in memory."""

    def __init__(self, servers: dict[str, SimulatedServer]) -> None:
        self._servers = servers
        self.steps: list[Step] = []

    def step(self, step: int, groups: list[TrajectoryGroup], metrics: dict[str, float]) -> None:
        """Keep training step `step`, counted from 1."""
        trajectories = sum(len(group.trajectories) for group in groups)
        for server in self._servers.values():
            server.settle()
        used = sum((server.used for server in self._servers.values()), Used())
        self.steps.append(Step(step, asyncio.get_running_loop().time(), metrics, used, trajectories))

    def close(self) -> None:
        """Nothing is open."""

    def heard(self, event: Event) -> None:
        """Note how long a step took in all."""
        if isinstance(event, StepTrained):
            made = self.steps[event.step - 1]
            made.seconds, made.phases, made.tail = event.seconds, event.phases, event.rollout_tail


class _NobodyGrades:
    async def same(self, one: str, other: str) -> bool | None:
        """Returns None: nothing is evaluated."""
        return None


class _Counting(Ledger):
    """A ledger in memory that knows how many groups were ever open at a time."""

    most_open = 0

    def admit(self, group: object) -> None:  # type: ignore[override]
        """Enter a group."""
        super().admit(group)  # type: ignore[arg-type]
        self.most_open = max(self.most_open, len(self._open))


@contextlib.contextmanager
def _silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _done: None


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
    meter, host, book = Meter(), Host(speeds.cores), Book()
    with meter:
        names = [f"server {number}" for number in range(config.rollout.engine.servers)]
        servers = {name: SimulatedServer(name, speeds.server, host, meter) for name in names}
        record = NumbersOnly(servers)
    engine_config, size = config.rollout.engine, config.rollout.group_size
    fleet = Fleet(patience_s=engine_config.request_timeout_s, restarts=engine_config.restarts)
    for name in names:
        fleet.join(name, name, engine_config.tp)
    traffic = Traffic(engine_config.traffic, fleet, ServerLoads(servers), most=config.rollout.concurrency)
    engine = SimulatedEngine(fleet, traffic, servers, book, meter)
    reward, tool = ScriptedReward(book, troubles.failing, seed), TimedTool(speeds, host)
    environment = ScriptedEnvironment(engine, tool, reward, workload, book, size, meter)
    rollouts = Rollouter(environment, config.rollout)
    publisher = SimulatedPublisher(fleet, servers, speeds, sleeping=config.weights.shares_devices)
    totals, ledger = RunTotals(), _Counting()
    loop = TrainLoop(
        config=config,
        admission=Admission(PromptSampler(workload.prompts(), seed)),
        rollouts=rollouts,
        trainer=SimulatedTrainer(config, speeds, host, meter, attention_weight),
        publisher=publisher,
        record=record,
        evaluations=Evaluations([], config.train.steps, Evaluator(rollouts, _NobodyGrades(), seed), record, totals),
        ledger=ledger,
        batches_of=counted_batches,
        progress=_silent,
        totals=totals,
        emit=record.heard,
    )
    await publisher.publish(0)
    failures = None if troubles.mtbf_s is None else Failures(fleet, servers, speeds, troubles.mtbf_s, seed)
    async with traffic.watched():
        failing = None if failures is None else asyncio.ensure_future(failures.happen())
        try:
            await loop.run()
        finally:
            if failing is not None:
                failing.cancel()
                await asyncio.gather(failing, return_exceptions=True)
    return Simulated(
        steps=record.steps,
        trajectories=sum(step.trajectories for step in record.steps),
        sampled=round(sum(server.used.tokens for server in servers.values())),
        ended=asyncio.get_running_loop().time(),
        controller_s=meter.controller_s,
        simulation_s=meter.simulated_s,
        most_in_flight=engine.most_in_flight,
        most_open=ledger.most_open * size,
        servers=len(servers),
        failures=0 if failures is None else failures.count,
        unbalanced=ledger.unbalanced(),
        ledger=ledger.summary(),
    )
