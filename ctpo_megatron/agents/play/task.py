"""What an agent is told: the task, and where the model answers. Never the answer.

Imported by the processes that call users' functions, so it imports little.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

# of a run's environment, what agents get; prefixes end with *
INHERITED = ("PATH", "HOME", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_*", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR")
VERSION = "/v1"  # where OpenAI's interface begins, below the address of the endpoint


@dataclass(frozen=True, slots=True)
class AgentTask:
    """One attempt, as its agent sees it."""

    url: str  # of the endpoint: http://127.0.0.1:8000
    api_key: str  # of this attempt alone
    model: str  # its name, for the client
    messages: list[dict[str, Any]]  # the prompt: role, content and whatever else the data have
    attempt: str  # such as g00000012.3
    timeout_s: float  # until it is ended

    @property
    def base_url(self) -> str:
        """Returns the address for clients of OpenAI's interface, which append `/chat/completions`."""
        return self.url + VERSION

    @property
    def question(self) -> str:
        """Returns the text of the last message."""
        return str(self.messages[-1]["content"])

    def to_json(self) -> str:
        """Returns it as a line of JSON."""
        return json.dumps(asdict(self))


def task_of(line: str | bytes) -> AgentTask:
    """Returns the task in a line of JSON."""
    return AgentTask(**json.loads(line))


def variables(task: AgentTask) -> dict[str, str]:
    """Returns what the clients of OpenAI and Anthropic read from their environment."""
    return {
        "OPENAI_BASE_URL": task.base_url,
        "OPENAI_API_BASE": task.base_url,
        "OPENAI_API_KEY": task.api_key,
        "OPENAI_DEFAULT_MODEL": task.model,
        "ANTHROPIC_BASE_URL": task.url,
        "ANTHROPIC_API_KEY": task.api_key,
        "ANTHROPIC_MODEL": task.model,
        "AGENT_ATTEMPT": task.attempt,
    }


def clean(environment: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """Returns what of a run's `environment` its agents get: `INHERITED`, and the names in `more`."""
    names = {*INHERITED, *more}
    prefixes = tuple(name[:-1] for name in INHERITED if name.endswith("*"))
    return {name: value for name, value in environment.items() if name in names or name.startswith(prefixes)}
