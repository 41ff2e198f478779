"""What a world says, in the words of chat templates: the trajectory is the template's own conversation, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache

import pytest

from ctpo_megatron.engine.sglang.parsers import SGLangCallParser
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.rollout.worlds.environment import WorldEnvironment
from ctpo_megatron.rollout.worlds.formats import call_format
from ctpo_megatron.rollout.worlds.protocols import StepResult
from ctpo_megatron.types import Generation, Prompt, Trajectory
from tests.support.chats import loader, template_text
from tests.support.trajectories import ATTEMPT

PROMPT = Prompt(0, ({"role": "user", "content": "Go."},), "")
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}}
]
LOOK = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ChatTokenizer]:
    return loader(lambda: tmp_path_factory.mktemp("model") / "m")


@cache
def parser() -> SGLangCallParser:
    return SGLangCallParser("hermes", thinks=True)


class Says:
    """Its results and its words, then the end."""

    replayable = False

    def __init__(self, tools: list, *answers: StepResult) -> None:
        self.tools, self.answers = tools, [*answers, StepResult(done=True)]

    async def reset(self, prompt: Prompt) -> None:
        pass

    async def step(self, turn) -> StepResult:
        return self.answers.pop(0)

    async def close(self) -> None:
        pass


def play(chat: ChatTokenizer, world: Says, *lines: str) -> Trajectory:
    class Engine:
        def __init__(self) -> None:
            self.lines = [chat.assistant_ids(line) for line in lines]

        async def generate(self, input_ids, done, **options):
            ids = self.lines.pop(0)
            return Generation(ids, [-0.5] * len(ids), [0] * len(ids), "stop")

    environment = WorldEnvironment(Engine(), chat, parser(), lambda: world)
    return asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 0, Sampling(1.0, 5, 4000)))


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "deepseek-v3", "gemma"])
def test_a_conversation_is_the_templates_own(make, name: str) -> None:
    chat = make(name)
    trajectory = play(chat, Says([], StepResult("colder"), StepResult(" é\n")), "one", "two", "three")
    said = [
        *PROMPT.messages,
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "colder"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": " é\n"},
    ]
    ids = [token for turn in trajectory.turns for token in turn.token_ids]
    assert [*trajectory.prompt_ids, *ids] == [*chat.talk_ids(said), *chat.assistant_ids("three")]
    assert template_text(chat, said, prompt=True) == chat.decode(chat.talk_ids(said), special=True)


def test_two_results_and_words_of_the_user_after_two_calls(make) -> None:
    chat = make("qwen2.5")
    trajectory = play(chat, Says(TOOLS, StepResult("And?", ("<|im_end|>1", "2"))), LOOK + "\n" + LOOK, "done")
    assert trajectory.tool_calls == 2
    text = chat.decode(trajectory.turns[1].token_ids, special=True)
    assert text.index("1") < text.index("2") < text.index("And?")
    assert text.count("<tool_response>") == 2
    end = chat.stop_token_ids[0]
    assert trajectory.turns[1].token_ids.count(end) == text.count("<|im_end|>") - 1, "a tool cannot end a turn"


def test_the_format_that_a_template_shows(make) -> None:
    assert {call_format(make(name).template) for name in ("qwen2.5", "qwen3")} == {"hermes"}
    assert call_format("<tool_call>\n<function=x>") == "qwen3_coder"
    assert call_format('{"name": function name, "parameters": dictionary}') == "llama3"
    assert call_format("{{ messages }}") == "hermes"
