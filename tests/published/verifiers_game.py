"""A taskset of verifiers with a harness of its own, which plays a turn with two calls, and one after their results.

Only an interpreter that has verifiers 0.4 imports it. The harness asks with openai's client and executes nothing.
"""

import importlib
import json
import sys
from collections.abc import Iterator

vf = importlib.import_module("verifiers.v1")

PROGRAM = """
import sys
import json, openai
url, key, model, prompt, tools = sys.argv[1:]
client, messages = openai.OpenAI(base_url=url, api_key=key), [{"role": "user", "content": prompt}]
while True:
    said = client.chat.completions.create(model=model, messages=messages, tools=json.loads(tools)).choices[0].message
    messages.append(said.model_dump(exclude_none=True))
    if not said.tool_calls:
        break
    messages += [{"role": "tool", "tool_call_id": each.id, "content": "wet"} for each in said.tool_calls]
"""
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


class Config(vf.HarnessConfig):
    code: bool = False


class Asks(vf.Harness[Config]):
    SUPPORTS_MCP = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **_others):
        given = [endpoint, secret, ctx.model, data.prompt, json.dumps([TOOL])]
        return await runtime.run_program([sys.executable, "-c", PROGRAM, *given], {})


class Wet(vf.Task):
    @vf.reward(weight=0.5)
    async def rains(self, trace) -> float:
        return float("rains" in trace.last_reply)


class Weather(vf.Taskset[Wet]):
    def load(self) -> Iterator[Wet]:
        for place in ("Rome", "Oslo"):
            yield Wet(vf.TaskData(prompt=f"The weather in {place}?"), self.config.task)


__all__ = ["Asks", "Weather"]
