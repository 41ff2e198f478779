"""500 trajectories on three real servers that are killed and stopped, and a sandbox that breaks: each ends exactly once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.config.tools import PythonTool
from ctpo_megatron.config.traffic import MovingConfig, TrafficConfig
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet, State
from ctpo_megatron.engine.server import new_api_key
from ctpo_megatron.loop.admission import Admission
from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.pipeline import Pipeline
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.rollout_events import GroupFailed
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.rollout.rewards.math import MathReward
from ctpo_megatron.rollout.rollouter import Rollouter
from ctpo_megatron.rollout.sandbox import BubblewrapPython, sandbox_available
from ctpo_megatron.toy.chain import Chain, make_chain_model
from ctpo_megatron.types import End, Prompt, Status, TrajectoryGroup
from tests.support.engines import START_S, RunningServer, start_server

SERVERS, SIZE, GROUPS, STEPS = 3, 4, 25, 5  # 25 groups of four make a step, and all 125 are admitted at once
IN_FLIGHT = SIZE * GROUPS * STEPS
STOPPED_S = 30.0
CHAIN = Chain(mean_turn=24, calls=0.25)
TOKENS = 96
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@dataclass
class Sandbox:
    """`bwrap` as the sandbox finds it on PATH; while it is `broken`, one that cannot make namespaces stands before it."""

    folder: Path

    @contextmanager
    def broken(self) -> Iterator[None]:
        wrong = self.folder / "bwrap"
        wrong.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
        wrong.chmod(0o755)
        try:
            yield
        finally:
            wrong.unlink()


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    if (reason := sandbox_available()) is not None:
        pytest.skip(reason)
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Sandbox(folder)


@pytest.fixture
def servers(tmp_path: Path, forks: Path) -> Iterator[list[RunningServer]]:
    model, key = make_chain_model(tmp_path / "model", CHAIN), new_api_key()
    started = []
    try:
        for number in range(SERVERS):
            started.append(start_server(model, tmp_path / f"server_{number}.log", key=key, forks=forks, wait=False))
        for each in started:
            each.server.wait_healthy(START_S)
        yield started
    finally:
        for each in started:
            with suppress(ProcessLookupError):
                os.killpg(each.server.pid, signal.SIGCONT)
            each.server.stop()


async def until(condition: Callable[[], bool], what: str, within_s: float = 120.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to this within {within_s:.0f} s: {what}"
        await asyncio.sleep(0.02)


def test_each_attempt_ends_once_whatever_breaks(servers: list[RunningServer], sandbox: Sandbox, tmp_path: Path) -> None:
    config = RolloutConfig(
        group_size=SIZE, concurrency=IN_FLIGHT, max_turns=3, max_response_tokens=TOKENS, retries=1, failed_share=0.9
    )
    rules = StepRules(GROUPS, staleness=STEPS - 1)
    events: list[Event] = []
    fleet = Fleet(patience_s=60, fixed_version=0, emit=events.append)
    members = [fleet.join(f"server {number}", each.url) for number, each in enumerate(servers)]
    prompts = [Prompt(n, ({"role": "user", "content": f"{n}?"},), "42") for n in range(200)]
    ledger, journal = Ledger(tmp_path / "ledger.jsonl"), Journal(tmp_path / "journal", "many servers")
    journal.published(0, "the weights that they were started with")
    admission = Admission(PromptSampler(prompts, 1))
    buffer = GroupBuffer(rules, first_step=0, last_step=STEPS, decisions=journal)
    reward = MathReward(MathRewardConfig())
    steps: list[list[TrajectoryGroup]] = []
    struck: list[int] = []  # how many trajectories each fault met

    def failed() -> int:
        return sum(isinstance(event, GroupFailed) for event in events)

    async def strike(rollouter: Rollouter) -> None:
        await until(lambda: len(rollouter._running) == IN_FLIGHT, f"{IN_FLIGHT} trajectories run")
        await until(lambda: sum(journal.count()) > 0, "the first has called its tool, or is finished")
        stopped, killed, _ = members
        struck.extend((stopped.in_flight, killed.in_flight))
        os.killpg(servers[0].server.pid, signal.SIGSTOP)
        until_s = time.monotonic() + STOPPED_S
        servers[1].server.stop()
        for _ in range(2):
            before = failed()
            with sandbox.broken():
                await until(lambda before=before: failed() > before, "the sandbox breaks a group")
            struck.append(len(rollouter._running))
        await until(lambda: killed.state is State.GONE, "the dead server is known")
        await asyncio.sleep(until_s - time.monotonic())
        os.killpg(servers[0].server.pid, signal.SIGCONT)

    async def train(pipeline: Pipeline) -> None:
        for step in range(STEPS):
            steps.append((await pipeline.take(step)).groups)
            assert ledger.unbalanced() == []
            buffer.published(step + 1)

    async def scenario() -> None:
        traffic = TrafficConfig(moving=MovingConfig(factor=2, least_s=5))
        async with EngineClient(fleet, servers[0].api_key, request_timeout_s=120, traffic=traffic, most=IN_FLIGHT) as client:
            tool = BubblewrapPython(PythonTool())
            environment = ToolEnvironment(client, ChatTokenizer(servers[0].model), tool, reward)
            rollouter = Rollouter(environment, config, journal, client)
            pipeline = Pipeline(admission, buffer, ledger, rollouter, config, events.append)
            async with asyncio.TaskGroup() as tasks:
                for work in (pipeline.feed(), train(pipeline), strike(rollouter)):
                    tasks.create_task(work)

    try:
        asyncio.run(scenario())
    finally:
        reward.close()
        journal.close()
        ledger.close()
    assert len(struck) == 4
    assert min(struck) > IN_FLIGHT / 50
    assert ledger.open == ()
    check_ledger(tmp_path / "ledger.jsonl", admission.groups, [each for each in events if isinstance(each, GroupFailed)])
    check_trained(steps)
    assert Journal(tmp_path / "journal", "many servers").count()[0] >= IN_FLIGHT, "what was trained on is kept whole"


def check_ledger(file: Path, admitted: int, failures: list[GroupFailed]) -> None:
    """Each admitted group has a line and each of its attempts one end; those that failed are the ones that were told of."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(int(line["group"].lstrip("g")) for line in lines) == list(range(admitted))
    for line in lines:
        assert [each["attempt"] for each in line["attempts"]] == list(range(SIZE)), line
    ends = Counter(line["end"] for line in lines)
    assert ends == {End.TRAINED: GROUPS * STEPS, End.FAILED: admitted - GROUPS * STEPS}
    statuses = {end: Counter(each["status"] for line in lines if line["end"] == end for each in line["attempts"]) for end in ends}
    assert statuses[End.TRAINED].keys() <= {Status.FINISHED, Status.LENGTH, Status.MAX_TURNS}
    assert statuses[End.FAILED].keys() <= {"failed", "aborted"}
    assert statuses[End.FAILED]["failed"] == len(failures) >= 2
    told = {event.group for event in failures}
    assert {line["group"] for line in lines if line["end"] == End.FAILED} == told


def check_trained(steps: list[list[TrajectoryGroup]]) -> None:
    """No token is missing, doubled or in a wrong place, also of trajectories that went on at another server: each has the
    log-prob that the model gives it there."""
    attempts = [each for groups in steps for group in groups for each in group.trajectories]
    assert len({each.id for each in attempts}) == len(attempts) == IN_FLIGHT
    for each in attempts:
        last = each.prompt_ids[-1]
        for turn in each.turns:
            if turn.role == "assistant":
                assert turn.rollout_logp == pytest.approx(CHAIN.logp(last, turn.token_ids), abs=1e-4), each.id
            last = turn.token_ids[-1]
        assert each.response_length <= TOKENS
