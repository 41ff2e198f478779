"""An agent with OpenAI's client for tests: it asks twice, and sends the first answer back with the second question.

It is called in a process of its own, as agents of users are.
"""

from __future__ import annotations

from openai import OpenAI

from ctpo_megatron.agents.play.task import AgentTask

STREAMED, NO_THINKING = "stream", "no thinking"  # words of a question
FIRST, SECOND = 1000, 12  # tokens of the two answers, at most


def play(task: AgentTask) -> str:
    """Returns the second answer."""
    with OpenAI(base_url=task.openai_url, api_key=task.api_key, max_retries=5) as client:
        first = _asked(client, task, list(task.messages), FIRST)
        said = {"role": "assistant", "content": first}
        return _asked(client, task, [*task.messages, said, {"role": "user", "content": "Are you sure?"}], SECOND)


def _asked(client: OpenAI, task: AgentTask, messages: list, limit: int) -> str:
    thinks = NO_THINKING not in task.question
    given = {"model": task.model, "messages": messages, "max_tokens": limit}
    given["extra_body"] = {"chat_template_kwargs": {"enable_thinking": thinks}}
    if STREAMED not in task.question:
        return client.chat.completions.create(**given).choices[0].message.content or ""
    parts = client.chat.completions.create(**given, stream=True)  # `stream()` raises where an answer is cut off by its length
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
