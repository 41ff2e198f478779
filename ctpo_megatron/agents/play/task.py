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


@dataclass(frozen=True, slots=True)
class AgentTask:
    """One attempt, as its agent sees it."""

    openai_url: str  # the base URL for clients of OpenAI's interface: http://127.0.0.1:8000/0123456789abcdef/v1
    anthropic_url: str  # that for clients of Anthropic's
    api_key: str  # of this attempt alone
    model: str  # its name, for the client
    messages: list[dict[str, Any]]  # the prompt: role, content and whatever else the data have
    attempt: str  # such as g00000012.3
    timeout_s: float  # until it is ended

    @property
    def question(self) -> str:
        """Returns the text of the last message."""
        return str(self.messages[-1]["content"])

    def to_json(self) -> str:
        """Returns it as a line of JSON."""
        return json.dumps(asdict(self))


def variables(task: AgentTask) -> dict[str, str]:
    """Returns what the clients of OpenAI and Anthropic read from their environment."""
    return {
        "OPENAI_BASE_URL": task.openai_url,
        "OPENAI_API_BASE": task.openai_url,
        "OPENAI_API_KEY": task.api_key,
        "OPENAI_DEFAULT_MODEL": task.model,
        "ANTHROPIC_BASE_URL": task.anthropic_url,
        "ANTHROPIC_API_KEY": task.api_key,
        "ANTHROPIC_MODEL": task.model,
        "AGENT_ATTEMPT": task.attempt,
    }


def clean(environment: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """Returns what of a run's `environment` its agents get: `INHERITED`, and the names in `more`."""
    names = {*INHERITED, *more}
    prefixes = tuple(name[:-1] for name in INHERITED if name.endswith("*"))
    return {name: value for name, value in environment.items() if name in names or name.startswith(prefixes)}
