"""What runs beside the harnesses, in their environment: calls the example that a task names."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from ctpo_megatron.agents.play.task import AgentTask

EXAMPLES = "examples.harnesses"


def play(task: AgentTask) -> Any:
    """Returns what the example gives, its text or what is to be awaited for it.

    The task's message has, beside its words, `example` (a module and a function of it) and `options` of that function.
    """
    (message,) = task.messages
    module, _, function = message["example"].partition(":")
    told = replace(task, messages=[{"role": message["role"], "content": message["content"]}])
    return getattr(import_module(f"{EXAMPLES}.{module}"), function)(told, **message["options"])
