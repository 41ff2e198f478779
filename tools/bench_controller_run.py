"""The controller of tools/bench_controller.py: what `ctpo train` does but for the trainer, and readings of what it takes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
from commands import ROOT

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet, State
from ctpo_megatron.engine.server import SGLangServer, new_api_key
from ctpo_megatron.engine.server_args import server_args, server_env
from ctpo_megatron.loop.admission import Admission
from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.pipeline import Pipeline
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.statistics import rollout_metrics
from ctpo_megatron.loop.train import first_failure, make_batches
from ctpo_megatron.ports import free_port
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.events import EventLog
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.rollout.rewards.math import MathReward
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.toy.chain import Chain, make_chain_model
from ctpo_megatron.types import AttemptId, Prompt, Trajectory

HOST, START_S, REQUEST_S = "127.0.0.1", 300.0, 1800.0
GROUP_SIZE, PROMPTS = 8, 4000
SETTLE_S = 5.0  # from the moment in which all are in flight: sending the first requests is no steady state
SAMPLE_S = 0.005  # of CPU time, between two looks at what the process does
EIGHTHS = 8  # readings of a run, of the trajectories that there are
# innermost frame first, the first that fits: where a file's path has the fragment, CPU time goes to the phase
PHASES = (
    ("/json/", "JSON of requests and records"),
    ("/aiohttp/", "HTTP"),
    ("rollout/journal", "journal"),
    ("record/segments", "journal"),
    ("loop/ledger", "ledger"),
    ("loop/tally", "ledger"),
    ("loop/buffer", "buffer and composition"),
    ("loop/composition", "buffer and composition"),
    ("data/packing", "batches"),
    ("data/samples", "batches"),
    ("algorithms/advantages", "batches"),
    ("loop/statistics", "record of steps"),
    ("/record/", "record of steps"),
    ("rollout/chat", "tokens and text"),
    ("rollout/tokens", "tokens and text"),
    ("rollout/template", "tokens and text"),
    ("rollout/messages", "tokens and text"),
    ("rollout/grading", "reward"),
    ("rollout/rewards", "reward"),
    ("/engine/", "client"),
    ("ctpo_megatron/types", "client"),
    ("/rollout/", "attempts and groups"),
    ("/loop/", "steps"),
    ("/asyncio/", "event loop"),
    ("selectors", "event loop"),
)


@dataclass(frozen=True)
class Plan:
    """What is sampled: by which model, and how many steps of `groups` groups at most. `limit_s`: for how long, once all are in
    flight; None: to the end."""

    chain: Chain
    longest: int
    steps: int
    groups: int
    staleness: int
    kv_tokens: int
    limit_s: float | None = None


@dataclass(frozen=True)
class Reading:
    """The controller at one moment; sums count from its start. `phases`: samples of its CPU time."""

    ended: int
    tokens: int
    wall_s: float
    cpu_s: float
    rss_mib: float
    held: dict[str, int]
    phases: dict[str, int]


class Counted:
    """An environment whose running and ended attempts are counted."""

    def __init__(self, inner: ToolEnvironment) -> None:
        self._inner = inner
        self.running = self.ended = self.tokens = 0

    def begin(self, prompt: Prompt, attempt: AttemptId) -> Attempt:
        """See `protocols.Environment`."""
        return self._inner.begin(prompt, attempt)

    async def run(
        self, attempt: Attempt, prompt: Prompt, session: int, sampling: Sampling, note: Callable[[Attempt], None]
    ) -> Trajectory:
        """See `protocols.Environment`."""
        self.running += 1
        try:
            made = await self._inner.run(attempt, prompt, session, sampling, note)
        finally:
            self.running -= 1
        self.ended += 1
        self.tokens += made.response_length
        return made


class Profile:
    """Samples of what this process does with its CPU time, by phase."""

    def __init__(self) -> None:
        self.phases: Counter[str] = Counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take samples while the context is open; in the main thread."""
        before = signal.signal(signal.SIGPROF, self._sample)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def _sample(self, _signal: int, frame: FrameType | None) -> None:
        self.phases[phase_of(frame)] += 1


def phase_of(frame: FrameType | None) -> str:
    """What a stack is at."""
    while frame is not None:
        file = frame.f_code.co_filename
        for fragment, phase in PHASES:
            if fragment in file:
                return phase
        frame = frame.f_back
    return "other"


class Controller:
    """A run without a trainer under `folder`; `steps` 0: those of `plan`."""

    def __init__(self, plan: Plan, folder: Path, *, in_flight: int, servers: int, steps: int, trace: bool) -> None:
        self._plan, self._folder, self._in_flight, self._trace = plan, folder, in_flight, trace
        self._steps = steps or plan.steps
        self._model = make_chain_model(folder / "model", plan.chain)
        self._config = self._configured(servers)
        self._profile = Profile()
        self._readings: list[Reading] = []
        self._own_s = 0.0  # CPU time that the readings took
        self._key = new_api_key()
        self._begun = time.monotonic()

    def _configured(self, servers: int) -> RunConfig:
        plan = self._plan
        words = [f"run_dir={self._folder}/run", f"model.path={self._model}", f"data.train={self._folder}", "data.eval=null"]
        words += [f"train.steps={self._steps}", f"train.prompts_per_step={plan.groups}", "train.optimizer_steps=1"]
        words += [f"train.staleness={plan.staleness}", f"rollout.group_size={GROUP_SIZE}", "rollout.max_turns=1"]
        words += [f"rollout.max_response_tokens={plan.longest}", f"rollout.concurrency={self._in_flight}", "rollout.tool=null"]
        words += [f"rollout.engine.max_total_tokens={plan.kv_tokens}", f"rollout.engine.servers={servers}"]
        return load_config(ROOT / "configs" / "quickstart.yaml", words)

    async def run(self) -> list[Reading]:
        """Returns readings from the moment in which all are in flight to the end, or to the limit."""
        (self._folder / "run").mkdir()
        async with AsyncExitStack() as stack:
            servers = await stack.enter_async_context(self._servers())
            fleet = Fleet(patience_s=START_S)
            fleet.serve([fleet.join(f"server {number}", server.url) for number, server in enumerate(servers)], 0)
            rollout = self._config.rollout
            client = await stack.enter_async_context(
                EngineClient(fleet, self._key, request_timeout_s=REQUEST_S, traffic=rollout.engine.traffic, most=self._in_flight)
            )
            reward = MathReward(MathRewardConfig())
            stack.callback(reward.close)
            self._environment = Counted(ToolEnvironment(client, ChatTokenizer(self._model), None, reward))
            self._open(stack, client)
            work = first_failure(asyncio.ensure_future(self._pipeline.feed()), asyncio.ensure_future(self._train(fleet, client)))
            with self._profile.running():
                await self._watched(asyncio.ensure_future(work))
        return self._readings

    @asynccontextmanager
    async def _servers(self) -> AsyncIterator[list[SGLangServer]]:
        engine, started = self._config.rollout.engine, list[SGLangServer]()
        try:
            for number in range(engine.servers):
                port = free_port(HOST)
                words = server_args(self._model, engine, device="cpu", dtype="float32", port=port, seed=1 + number)
                log, env = self._folder / f"server_{number}.log", server_env(engine, device="cpu")
                started.append(SGLangServer(words, url=f"http://{HOST}:{port}", api_key=self._key, log=log, env=env))
            for server in started:
                await asyncio.to_thread(server.wait_healthy, START_S)
            yield started
        finally:
            for server in started:
                await asyncio.to_thread(server.stop)

    def _open(self, stack: AsyncExitStack, client: EngineClient) -> None:
        """Put the controller's parts together, as `jobs.train` does."""
        run_dir, rules = self._folder / "run", StepRules.of(self._config)
        self._journal = Journal(run_dir / "journal", "bench")
        self._journal.published(0, "0")
        self._ledger = Ledger(run_dir / "ledger.jsonl")
        self._record = RunRecord(run_dir, self._config.log, Recorder(run_dir, self._config.log))
        prompts = [Prompt(number, ({"role": "user", "content": f"{number}?"},), "42") for number in range(PROMPTS)]
        self._admission = Admission(PromptSampler(prompts, 1))
        self._buffer = GroupBuffer(rules, first_step=0, last_step=self._steps, decisions=self._journal)
        rollouter = Rollouter(self._environment, self._config.rollout, self._journal, client)
        events = stack.enter_context(contextlib.closing(EventLog(run_dir, [])))
        self._pipeline = Pipeline(self._admission, self._buffer, self._ledger, rollouter, self._config.rollout, events)
        for each in (self._journal, self._ledger, self._record):
            stack.callback(each.close)

    async def _train(self, fleet: Fleet, client: EngineClient) -> None:
        for step in range(self._steps):
            taken = await self._pipeline.take(step)
            make_batches(taken.groups, self._config)
            await self._publish(fleet, client, step + 1)
            self._record.step(step + 1, taken.groups, rollout_metrics(taken.groups, step) | taken.metrics)
            self._journal.forget(min(self._buffer.open, default=self._admission.groups), step)  # a checkpoint was kept
            self._buffer.published(step + 1)

    async def _publish(self, fleet: Fleet, client: EngineClient, version: int) -> None:
        """Let the servers call the weights that they have the next version."""
        members = fleet.members(State.SERVING)
        fleet.update(members)
        for member in members:
            await client.control.pause(member.url)
            await client.control.set_version(member.url, version)
            await client.control.resume(member.url)
        self._journal.published(version, str(version))
        fleet.serve(members, version)

    async def _watched(self, work: asyncio.Future[None]) -> None:
        """Take readings until `work` is done, or the limit is over."""
        total, counted = self._steps * self._plan.groups * GROUP_SIZE, self._environment
        try:
            while counted.running < self._in_flight and not work.done():
                await asyncio.sleep(0.05)
            await asyncio.wait([work], timeout=SETTLE_S)
            begun = time.monotonic()
            self._read()
            while not work.done():
                await asyncio.wait([work], timeout=0.1)
                if self._plan.limit_s is not None and time.monotonic() - begun > self._plan.limit_s:
                    break
                if counted.ended >= len(self._readings) * total / EIGHTHS:
                    self._read()
            self._read()
        finally:
            if work.done():
                work.result()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def _read(self) -> None:
        if self._trace and len(self._readings) == EIGHTHS // 2:
            tracemalloc.start(12)
            self._before = tracemalloc.take_snapshot()
        elif self._trace and tracemalloc.is_tracing():
            self._tell_growth()
        times = psutil.Process().cpu_times()
        gc.collect()
        held = {
            "groups open": len(self._ledger.open),
            "attempts in the journal": sum(self._journal.count()),
            "tasks": len(asyncio.all_tasks()),
            "objects": len(gc.get_objects()),
        }
        counted = self._environment
        self._readings.append(
            Reading(
                counted.ended,
                counted.tokens,
                time.monotonic() - self._begun,
                times.user + times.system - self._own_s,
                psutil.Process().memory_info().rss / 2**20,
                held,
                dict(self._profile.phases),
            )
        )
        print(f"{counted.ended} ended, {self._readings[-1].rss_mib:.0f} MiB, {held}", file=sys.stderr, flush=True)
        spent = psutil.Process().cpu_times()
        self._own_s += spent.user + spent.system - times.user - times.system

    def _tell_growth(self) -> None:
        for each in tracemalloc.take_snapshot().compare_to(self._before, "lineno")[:12]:
            print(f"  {each}", file=sys.stderr, flush=True)
