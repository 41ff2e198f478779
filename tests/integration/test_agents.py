"""Programs that speak to a real SGLang server through the endpoint: what is trained on is what the server sampled."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.agents.http.exchange import Counts
from ctpo_megatron.agents.play.environment import AgentEnvironment
from ctpo_megatron.agents.play.kinds import make_runner
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.agents import CommandAgent, FunctionAgent, LocalAgent
from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.jobs.endpoint import open_endpoint
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score
from ctpo_megatron.rollout.rewards.math import MathReward
from ctpo_megatron.types import AttemptId, Generation, GroupId, Prompt, Trajectory
from tests.support.agents import check_sampled
from tests.support.chat_models import QWEN3
from tests.support.engines import RunningServer, in_flight, load_reference, reference_logprobs
from tests.support.publishing import AGREEMENT, perturbed, publishing
from tests.support.talking_agent import FIRST, NO_THINKING, STREAMED

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


class Worthless:
    """Whatever was said."""

    async def score(self, _prompt: Prompt, _outcome: Outcome) -> Score:
        return Score(0.0)


def of_run(agent: LocalAgent, model: Path, run_dir: Path) -> RunConfig:
    """The configuration of a run whose attempts `agent` plays."""
    settings = {"name": "agents", "run_dir": str(run_dir), "model": {"path": str(model)}, "data": {"train": "none"}}
    return RunConfig.model_validate(settings | {"rollout": {"tool": None, "agent": agent.model_dump()}})


class NeverStops(Logged):
    """The same, with turns that end by their lengths alone."""

    async def generate(self, input_ids: list[int], done: Generation, **options: Any) -> Generation:
        return await super().generate(input_ids, done, **options | {"stop_token_ids": []})


@pytest.mark.long
def test_weights_change_while_a_harness_plays(server: RunningServer, qwen3: Path, tmp_path: Path) -> None:
    """In the middle of a turn the connection is lost, which the client repeats, and the weights change: thinking and not,
    streamed and not. What is trained on is what the server sampled, by either weights."""
    old, new = load_reference(qwen3), perturbed(qwen3, seed=7)
    outside = replace(QWEN3, plain=(*QWEN3.plain, "<|unused|>", "<|never|>"))  # the last one is no token of the model
    chat = ChatTokenizer(outside.write(tmp_path / "chat"), ChatConfig(stop_tokens=("<|never|>",)))
    agent = FunctionAgent(path="tests.support.talking_agent:play", workers=1, timeout_s=120.0)
    questions = ["", STREAMED, NO_THINKING, f"{STREAMED}, {NO_THINKING}"]
    prompts = [Prompt(n, ({"role": "user", "content": f"1 + 1? {words}"},), "2") for n, words in enumerate(questions)]

    async def play() -> tuple[list[Trajectory], Logged, Counts]:
        async with publishing(server, old) as (_, publisher):
            await publisher.publish(50)
        async with (
            publishing(server, new) as (client, publisher),
            open_endpoint(agent, of_run(agent, server.model, tmp_path), chat) as endpoint,
        ):
            engine, runner = NeverStops(client), make_runner(agent, tmp_path)
            environment = AgentEnvironment(endpoint, engine, runner, Worthless(), agent)
            sampling = Sampling(1.0, max_turns=2, max_response_tokens=1500)
            try:
                attempts = [environment.begin(prompt, AttemptId(GroupId(prompt.index), 0)) for prompt in prompts]
                running = [
                    asyncio.create_task(environment.run(each, prompt, prompt.index, sampling))
                    for each, prompt in zip(attempts, prompts, strict=True)
                ]
                await in_flight(server.url, server.api_key, running=len(prompts))
                await endpoint.server.restart()
                await publisher.publish(51)
                return await asyncio.gather(*running), engine, endpoint.server.counts
            finally:
                await runner.close()

    async def as_it_was() -> None:
        async with publishing(server, old) as (_, publisher):
            await publisher.publish(0)

    made, engine, counts = asyncio.run(play())
    asyncio.run(as_it_was())
    assert (counts.cut, counts.retries, counts.refused, counts.answered) == (4, 4, 0, 8)
    for session, (each, words) in enumerate(zip(made, questions, strict=True)):
        check_sampled(each, engine.log[session])
        assert ([turn.role for turn in each.turns], each.branches) == (["assistant", "tool", "assistant"], [])
        assert chat.decode(each.prompt_ids, special=True).endswith("</think>\n\n") is (NO_THINKING in words)
        first, second = each.turns[0], each.turns[2]
        changed = first.versions.count(50)
        assert first.versions == [50] * changed + [51] * (FIRST - changed)
        assert 0 < changed < FIRST
        assert set(second.versions) == {51}
        by_old, by_new = (reference_logprobs(model, each.prompt_ids, Generation(first.token_ids), 1.0) for model in (old, new))
        assert first.rollout_logp == pytest.approx(by_old[:changed] + by_new[changed:], abs=AGREEMENT)


def test_two_attempts_of_an_unchanged_program(server: RunningServer, tmp_path: Path) -> None:
    agent = CommandAgent(command=(sys.executable, str(AGENT), str(TOKENS)), timeout_s=120.0)
    config = of_run(agent, server.model, tmp_path)
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
