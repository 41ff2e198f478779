"""Harnesses of other people, unchanged, from their own packages: what is trained on is what was sampled for them.

`make test-harnesses` makes their environment, .venv-harnesses, and runs these tests, which are no part of `make test`: the
packages need others than SGLang. Agents and endpoint are a run's own; the engine says its lines, and changes its version within
each.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.agents.http.keys import KeyedEpisodes
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.play.environment import AgentEnvironment, Endpoint
from ctpo_megatron.agents.play.functions import FunctionRunner
from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.config.agents import FunctionAgent
from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.engine.sglang.parsers import SGLangCallParser
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score
from ctpo_megatron.types import Generation, Prompt, Status, Trajectory
from tests.harnesses.harnesses import ANSWER, FORMATS, HARNESSES, SUBMITS, Format, Harness
from tests.support.agents import Engine, check_sampled
from tests.support.published import published_or_skip
from tests.support.trajectories import ATTEMPT

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-harnesses" / "bin" / "python"
THOUGHT = "<think>\nIt is easy: é.\n</think>\n\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"  # that the template writes with thinking off
SAMPLING = Sampling(1.0, 5, 4096)
MAX_PROMPT = 8192

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="the harnesses are not installed: make test-harnesses")


@dataclass
class CutOff(Engine):
    """Cuts all clients off, once, while it writes turn `cut`; never where it is None."""

    server: AgentServer | None = None
    cut: int | None = None

    async def generate(self, input_ids: list[int], done: Generation, **options: Any) -> Generation:
        if self.cut == len(self.log):
            self.cut = None
            assert self.server is not None
            await self.server.restart()
        return await super().generate(input_ids, done, **options)


@dataclass
class Said:
    """A reward that keeps what it was asked."""

    texts: list[str] = field(default_factory=list)

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        self.texts.append(outcome.text)
        return Score(1.0)


@dataclass
class Played:
    """One attempt: what it came to, what was sampled in it, and what the endpoint counted."""

    made: Trajectory
    engine: CutOff
    server: AgentServer
    texts: list[str]


class Stage:
    """The processes of harnesses, one for each, and the loop that they are used in."""

    def __init__(self, directory: Path) -> None:
        self._loop = asyncio.Runner()
        self._logs = directory / "agents"
        self._runners: dict[str, FunctionRunner] = {}
        self._config = FunctionAgent(
            path="tests.harnesses.players:play",
            python=str(PYTHON),
            workers=1,
            env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "MSWEA_SILENT_STARTUP": "1"},
        )

    def play(
        self,
        name: str,
        chat: ChatTokenizer,
        lines: tuple[str, ...],
        *,
        stream: bool,
        cut: int | None = None,
        form: str = "hermes",
    ) -> Played:
        try:
            return self._loop.run(self._play(name, chat, lines, stream, cut, form))
        except Exception as error:
            for log in sorted(self._logs.glob("*.log")):
                error.add_note(log.read_text(encoding="utf-8")[-4000:])
            raise

    async def _play(
        self, name: str, chat: ChatTokenizer, lines: tuple[str, ...], stream: bool, cut: int | None, form: str
    ) -> Played:
        if name not in self._runners:
            self._runners[name] = FunctionRunner(self._config, AgentLogs(self._logs))
        harness, episodes, reward = HARNESSES[name], KeyedEpisodes(), Said()
        options = {"stream": stream} if harness.streams else {}
        message = {"role": "user", "content": "What is 1 + 1?", "example": harness.example, "options": options}
        prompt = Prompt(0, (message,), "2")
        async with AgentServer(episodes) as server:
            engine = CutOff(chat, list(lines), server=server, cut=cut)
            endpoint = Endpoint(server, episodes, chat, SGLangCallParser(form, thinks=chat.thinks), MAX_PROMPT)
            environment = AgentEnvironment(endpoint, engine, self._runners[name], reward, self._config)
            made = await environment.run(environment.begin(prompt, ATTEMPT), prompt, 0, SAMPLING)
        return Played(made, engine, server, reward.texts)

    def close(self) -> None:
        async def end() -> None:
            for runner in self._runners.values():
                await runner.close()

        self._loop.run(end())
        self._loop.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("stage"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], ChatTokenizer]:
    """Qwen3's published tokenizer, with thinking on or off."""
    directory = published_or_skip("qwen3", tmp_path_factory.mktemp("qwen3"))
    made = {thinks: ChatTokenizer(directory, ChatConfig(chat_options={"enable_thinking": thinks})) for thinks in (True, False)}
    return made.__getitem__


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Llama 3.1's published tokenizer, whose template writes one call in a turn at most."""
    return ChatTokenizer(published_or_skip("llama3_1", tmp_path_factory.mktemp("llama")))


def up_to_stop(log: list[tuple[list[int], Generation]]) -> list[tuple[list[int], Generation]]:
    """What was sampled, less the last token of each turn, which is behind the text that the client lets it end with."""

    def cut(each: Generation) -> Generation:
        return replace(each, token_ids=each.token_ids[:-1], rollout_logp=each.rollout_logp[:-1], versions=each.versions[:-1])

    return [(prompt, cut(made)) for prompt, made in log]


CASES = [
    pytest.param(name, stream, id=f"{name}-streamed" if stream else name)
    for name, harness in HARNESSES.items()
    for stream in (False, True)
    if harness.streams or not stream
]


@pytest.mark.parametrize(("name", "stream"), CASES)
@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "not thinking"])
@pytest.mark.parametrize("cut", [None, 0, 1], ids=["", "first request cut off", "second request cut off"])
def test_what_is_trained_on_is_what_was_sampled(
    stage: Stage, chat: Callable[[bool], ChatTokenizer], name: str, stream: bool, thinking: bool, cut: int | None
) -> None:
    if name == "mini-swe-agent" and shutil.which("bwrap") is None:
        pytest.skip("mini-swe-agent's commands run in bubblewrap, which is not installed")
    harness, tokens = HARNESSES[name], chat(thinking)
    lines = tuple(THOUGHT + line for line in harness.lines) if thinking else harness.lines
    played = stage.play(name, tokens, lines, stream=stream, cut=cut)
    made, log = played.made, played.engine.log

    assert played.texts == [harness.answer]
    assert made.status is Status.FINISHED
    assert [tokens.decode(sampled.token_ids) for _, sampled in log] == list(lines)  # each line once, with a retry too
    check_sampled(made, up_to_stop(log) if harness.stopped else log)
    _check_shape(harness, made)
    last = made.turns[-1].versions
    assert (last[0], last[-1]) == (len(lines) - 1, len(lines))  # the version changed between turns, and within each
    assert tokens.decode(made.prompt_ids, special=True).endswith(NO_THOUGHT) is not thinking
    counts = played.server.counts
    assert (counts.answered, counts.refused) == (len(lines), 0)
    assert (counts.cut, counts.retries) == ((0, 0) if cut is None else (1, 1))


def _check_shape(harness: Harness, made: Trajectory) -> None:
    """One conversation, but for the turn that the harness takes out of its history."""
    assert [turn.role for turn in made.turns] == ["assistant", "tool", "assistant"]
    if harness.removed is None:
        assert made.branches == []
        return
    (branch,) = made.branches
    assert [turn.role for turn in branch.turns] == ["assistant"]
    assert branch.turns[0].versions[0] == harness.removed
    kept = [*made.prompt_ids, *made.turns[0].token_ids]
    assert branch.prompt_ids[: len(kept)] == kept


CALLERS = [case for case in CASES if case.values[0] not in ("smolagents", "smolagents-code", "mini-swe-agent")]


def of_template(form: Format, chat: Callable[[bool], ChatTokenizer], request: pytest.FixtureRequest) -> ChatTokenizer:
    return request.getfixturevalue("llama") if form.template == "llama" else chat(False)


@pytest.mark.parametrize(("name", "stream"), CALLERS)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_parallel_calls_in_the_formats_of_models(
    stage: Stage, chat: Callable[[bool], ChatTokenizer], request: pytest.FixtureRequest, name: str, stream: bool, form: Format
) -> None:
    """Each call gets its result, in their order, and the turn comes back as the one that was sampled."""
    tokens = of_template(form, chat, request)
    both = form.written(("add", '{"b": 1.0,  "a": 1}'), ("add", '{"a":20,"b":  0.5}'))
    played = stage.play(name, tokens, (both, ANSWER), stream=stream, form=form.name)
    made, log = played.made, played.engine.log
    assert (played.texts, made.status, made.branches) == ([ANSWER], Status.FINISHED, [])
    check_sampled(made, log)
    assert made.tool_calls == 2
    said = tokens.decode(made.turns[1].token_ids)
    first, second = (min(said.find(text) for text in texts if text in said) for texts in (("2", "2.0"), ("20.5",)))
    assert first < second, said
    assert tokens.decode(made.turns[0].token_ids).startswith(both)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_call_within_a_call_is_text(
    stage: Stage, chat: Callable[[bool], ChatTokenizer], request: pytest.FixtureRequest, form: Format
) -> None:
    """What looks like a call within a string of a call is printed by the shell that it is given to, and nobody calls it."""
    if shutil.which("bwrap") is None:
        pytest.skip("mini-swe-agent's commands run in bubblewrap, which is not installed")
    tokens = of_template(form, chat, request)
    inner = form.written(("bash", '{"command": "exit 3"}'))
    outer = form.written(("bash", json.dumps({"command": f"cat <<'END'\n{inner}\nEND"})))
    ends = form.written(("bash", SUBMITS))
    played = stage.play("mini-swe-agent", tokens, (outer, ends), stream=False, form=form.name)
    assert (played.texts, played.made.tool_calls, played.made.branches) == (["2\n"], 2, [])
    check_sampled(played.made, played.engine.log)
    said = tokens.decode(played.made.turns[1].token_ids, special=True)
    assert '"command": "exit 3"' in said.replace("\\", "")
