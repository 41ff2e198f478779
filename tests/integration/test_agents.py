"""Programs that speak to a real SGLang server through the endpoint: what is trained on is what the server sampled."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.agents.play.environment import AgentEnvironment
from ctpo_megatron.agents.play.kinds import make_runner
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.agents import CommandAgent
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.jobs.endpoint import open_endpoint
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.rollout.rewards.math import MathReward
from ctpo_megatron.types import AttemptId, Generation, GroupId, Prompt, Trajectory
from tests.support.engines import RunningServer

pytestmark = pytest.mark.integration

AGENT = Path(__file__).resolve().parents[2] / "examples" / "any_agent.py"
PROMPT = Prompt(3, ({"role": "user", "content": "What is 1 + 1?"},), "2")
TOKENS = 8  # of each turn


@dataclass
class Logged:
    """The engine behind `client`, and what it was asked and sampled."""

    client: EngineClient
    log: dict[int, list[tuple[list[int], Generation]]] = field(default_factory=dict)  # by session

    async def generate(self, input_ids: list[int], done: Generation, **options: Any) -> Generation:
        made = await self.client.generate(input_ids, done, **options)
        self.log.setdefault(options["session"], []).append((list(input_ids), made.copy()))
        return made


def test_two_attempts_of_an_unchanged_program(server: RunningServer, tmp_path: Path) -> None:
    agent = CommandAgent(command=(sys.executable, str(AGENT), str(TOKENS)), timeout_s=120.0)
    settings = {"name": "agents", "run_dir": str(tmp_path), "model": {"path": str(server.model)}, "data": {"train": "none"}}
    config = RunConfig.model_validate(settings | {"rollout": {"tool": None, "agent": agent.model_dump()}})
    chat, reward = ChatTokenizer(server.model), MathReward(config.rollout.reward)

    async def play() -> tuple[list[Trajectory], Logged]:
        async with server.client() as client, open_endpoint(agent, config, chat) as endpoint:
            engine, runner = Logged(client), make_runner(agent, tmp_path)
            environment = AgentEnvironment(endpoint, engine, runner, reward, agent)
            attempts = [environment.begin(PROMPT, AttemptId(GroupId(0), number)) for number in range(2)]
            sampling = Sampling(1.0, max_turns=4, max_response_tokens=200)
            made = await asyncio.gather(
                *(environment.run(each, PROMPT, session, sampling) for session, each in enumerate(attempts))
            )
            assert len(endpoint.episodes) == 0
            return list(made), engine

    try:
        made, engine = asyncio.run(play())
    finally:
        reward.close()
    assert made[0].turns[0].token_ids != made[1].turns[0].token_ids  # each attempt is sampled by itself
    for session, each in enumerate(made):
        assert ([turn.role for turn in each.turns], each.branches) == (["assistant", "tool", "assistant"], [])
        before = list(each.prompt_ids)
        sampled = iter(engine.log.pop(session))
        for turn in each.turns:
            if turn.role == "assistant":
                asked, generation = next(sampled)
                assert asked == before
                streams = generation.token_ids, generation.rollout_logp, generation.versions
                assert (turn.token_ids, turn.rollout_logp, turn.versions) == streams
                assert len(turn.token_ids) <= TOKENS
            before += turn.token_ids
        assert next(sampled, None) is None
        assert chat.decode(each.prompt_ids, special=True) == "<|user|>What is 1 + 1?<|im_end|><|assistant|>"
    assert not engine.log
