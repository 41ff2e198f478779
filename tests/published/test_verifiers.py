"""An environment of the published verifiers package, played through the endpoint by a harness of its own.

Its 96 packages lie in an environment of their own, which `make test-verifiers` makes (tests/published/verifiers.lock). Where
there is none these tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.agents.adapters import verifiers
from ctpo_megatron.agents.play.functions import FunctionRunner, check_function
from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.agents.play.runner import AgentFailed, Answer
from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.agents.protocols import EpisodeOver
from ctpo_megatron.config.agents import FunctionAgent
from ctpo_megatron.errors import ConfigError
from tests.support.scripted_episodes import HOUR, WEATHER, Served, served, two_turns

HERE = Path(__file__).resolve().parent
VENV = HERE.parents[1] / ".venv-verifiers"
PYTHON = VENV / "bin" / "python"
GAME = {"taskset": {"id": "verifiers-game"}}
PROMPT = "The weather in Oslo?"
LIMIT_S = 500.0

pytestmark = pytest.mark.skipif(
    not (VENV / ".installed").exists(), reason="verifiers is not installed; `make test-verifiers` does that"
)


def agent(env: dict[str, Any] = GAME, **options: Any) -> FunctionAgent:
    return FunctionAgent(
        path=f"{verifiers.NAME}:Player",
        python=str(PYTHON),
        workers=1,
        start_timeout_s=600,
        env={"PYTHONPATH": str(HERE)},
        options={"env": env, **options},
    )


async def played(given: Served, logs: Path, prompt: str = PROMPT) -> Answer:
    task = AgentTask(given.openai, given.anthropic, given.key, "policy", [{"role": "user", "content": prompt}], "g0.1", LIMIT_S)
    runner = FunctionRunner(agent(), AgentLogs(logs))
    try:
        async with asyncio.timeout(LIMIT_S):
            return await runner.play(task)
    finally:
        await runner.close()


def test_an_episode_is_the_policys_turns_and_has_the_environments_reward(tmp_path: Path) -> None:
    async def check() -> None:
        async with served() as given:
            assert await played(given, tmp_path) == Answer("It rains: ü€😀.", 0.5)
            first, second = given.episode.requests
            assert given.episode.sampled == 2
            assert first.messages == ({"role": "user", "content": PROMPT},)
            assert [tool["function"]["name"] for tool in first.tools] == ["weather"]
            assert [call["id"] for call in second.messages[1]["tool_calls"]] == [WEATHER.id, HOUR.id]
            assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == WEATHER.arguments
            assert [each["content"] for each in second.messages[2:]] == ["wet", "wet"]

    asyncio.run(check())


def test_an_attempt_that_its_bounds_end_is_worth_nothing_and_a_fault_fails(tmp_path: Path) -> None:
    async def check() -> None:
        async with served(two_turns()[0], EpisodeOver("it has had its turns")) as given:
            assert (await played(given, tmp_path)).reward == 0.0
        async with served(ValueError("a fault of the run's")) as given:
            with pytest.raises(AgentFailed, match="the episode failed"):
                await played(given, tmp_path)
        async with served() as given:
            with pytest.raises(AgentFailed, match="no task of verifiers-game has the prompt 'The weather in Bern"):
                await played(given, tmp_path, "The weather in Bern?")

    asyncio.run(check())


def test_what_cannot_be_played_is_refused_before_the_start() -> None:
    shell = GAME | {"agent": {"harness": {"id": "bash"}}}
    for refused, words in (
        (agent(shell), "would run unconfined on this machine"),
        (agent({"taskset": {"id": "none-such"}}), "none-such"),
        (agent(GAME, task=1), "does not take rollout.agent.options"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_function(refused)
    check_function(agent(shell | {"agent": {"harness": {"id": "bash"}, "runtime": {"type": "docker"}}}))


def test_prompts_are_written_for_the_run(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    command = [str(PYTHON), "-m", verifiers.NAME, json.dumps(GAME), str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.stdout == f"{path}: 2 prompts\n", done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1]["prompt"] == [{"role": "user", "content": PROMPT}]
    assert len({row["reward_model"]["ground_truth"] for row in rows}) == 2
