"""The harnesses, what the model says to each, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.agents import hermes

ADDS = "I add.\n" + hermes("add", '{"b": 1.0,  "a": 1}')  # no harness writes its arguments like this
ANSWER = "It is 2: ü€😀."
SUBMITS = '{"command":"echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && echo 2"}'


@dataclass(frozen=True)
class Harness:
    """One way to play: `example` is a module and its function in examples/harnesses.

    `lines`: what the model says; `answer`: what the harness makes of it; `removed`: the turn that it takes out of its history;
    `stopped`: whether it gives a text that ends each turn, so that the end-of-turn token is none of the turn.
    """

    example: str
    lines: tuple[str, ...] = (ADDS, ANSWER)
    answer: str = ANSWER
    streams: bool = True
    removed: int | None = None
    stopped: bool = False


@dataclass(frozen=True)
class Format:
    """How models write calls: `name` is SGLang's, `call` takes a name and arguments, `template` is whose chat template it is."""

    name: str
    call: str
    between: str
    template: str = "qwen"

    def written(self, *calls: tuple[str, str]) -> str:
        """A turn that holds these calls, each a name and its arguments, and nothing else."""
        return self.between.join(self.call % each for each in calls)


FORMATS = {
    "hermes": Format("hermes", '<tool_call>{"name": "%s", "arguments": %s}</tool_call>', ""),
    "qwen": Format("qwen25", '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>', "\n"),
    "llama": Format("llama3", '<|python_tag|>{"name": "%s", "parameters": %s}', "; ", "llama"),
}

HARNESSES = {
    "openai": Harness("with_openai:play"),
    "anthropic": Harness("with_anthropic:play"),
    "openai-agents": Harness("with_openai_agents:play"),
    "smolagents": Harness(
        "with_smolagents:play", (hermes("add", '{"b": 1.0,  "a": 1}'), hermes("final_answer", '{"answer": "2 ü€"}')), "2 ü€"
    ),
    "smolagents-code": Harness(
        "with_smolagents:play_code",
        ("I add.\n<code>\nprint(add(1,  1))\n</code>", "So it is:\n<code>\nfinal_answer('2 ü€')\n</code>"),
        "2 ü€",
        stopped=True,
    ),
    "pydantic-ai": Harness("with_pydantic_ai:play"),
    "pydantic-ai-anthropic": Harness("with_pydantic_ai:play_anthropic"),
    "langgraph": Harness("with_langgraph:play"),
    "litellm": Harness("with_litellm:play"),
    "mini-swe-agent": Harness(
        "with_mini_swe_agent:play",
        ("I look.\n" + hermes("bash", '{"command":  "echo $((1 + 1))"}'), ANSWER, hermes("bash", SUBMITS)),
        "2\n",
        streams=False,
        removed=1,
    ),
}
