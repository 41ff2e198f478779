"""Agents: programs of others that play attempts through an endpoint, unchanged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ctpo_megatron.config.base import FilePath, Section


class AgentEndpoint(Section):
    """What all kinds of agents have in common: where they are served, and for how long."""

    host: str = "127.0.0.1"
    """Address that the endpoint listens at. The default is reached from this machine only; beyond it, whoever has the key of an
    attempt may speak for it, unencrypted (docs/agents.md)."""
    port: Annotated[NonNegativeInt, Field(le=65_535)] = 0
    """Port of the endpoint. 0: a free one."""
    timeout_s: PositiveFloat = 600.0
    """How long an agent may work on one attempt. Then it is ended; what was sampled by then is judged, with the status
    `deadline`. In training the shorter of this and rollout.deadline_s counts."""
    calls: Literal["hermes", "qwen25", "qwen3_coder", "llama3"] = "hermes"
    """Format in which the model's chat template writes calls of tools, by SGLang's names. hermes: `<tool_call>` around JSON, as
    Qwen3 has it too."""
    model: str = "policy"
    """What the model is called towards agents. Some harnesses read from its name what it can do."""

    @field_validator("host")
    @classmethod
    def _agents_can_be_told_it(cls, host: str) -> str:
        if host in ("", "0.0.0.0", "::"):
            raise ValueError(
                f"host={host!r} is every interface, and no address that an agent can be told; give that of one interface"
            )
        return host


class LocalAgent(AgentEndpoint):
    """An agent that the run starts."""

    env: dict[str, str] = Field(default_factory=dict)
    """Further environment variables of the agent's processes. They get nothing of the run's own environment but PATH, HOME,
    PYTHONPATH, the language, the time zone, certificates, and what pass_env names."""
    pass_env: tuple[str, ...] = ()
    """Names of variables that are taken over from the environment of `ctpo`. No secret of the run is among them unless it is
    named here."""
    on_failure: Literal["retry", "judge"] = "retry"
    """What an agent's own failure means (an exit code other than 0, an exception). retry: the attempt is made anew, as often as
    rollout.retries says, and then counts as failed. judge: what was sampled is judged and trained on; for harnesses that fail
    where the model makes a mistake. An attempt whose own bounds ended it (tokens, turns, time) is judged in either case, and one
    for which nothing was sampled is made anew."""
    log_kb: NonNegativeInt = 64
    """How much of what an agent writes to stderr is kept in RUN_DIR/logs/agents; of more, the beginning."""


class CommandAgent(LocalAgent):
    """A program, started anew for each attempt. The endpoint's address and key are in its environment (docs/agents.md)."""

    type: Literal["command"] = "command"
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    """The program and its arguments. No shell reads them. `{task}` stands for the path of a file with the task."""
    cwd: FilePath | None = None
    """Its working directory. null: an empty one of its own, which is removed afterwards."""
    answer: Literal["said", "stdout"] = "said"
    """What is judged. said: the last text that the model wrote; stdout: what the program prints, at most 64 KiB."""


class FunctionAgent(LocalAgent):
    """A function, called for each attempt in processes that live on, so that a harness is imported once in each."""

    type: Literal["function"] = "function"
    path: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:function`, `async` or not, called with an `AgentTask`. It returns the text that is judged, None for the
    last text that the model wrote, or `{"text": ..., "reward": ...}`, whose reward counts in place of rollout.reward's. Or a
    class: one object of it is made in each process, and called."""
    options: dict[str, Any] = Field({})
    """Further arguments of the function, by name, or those that an object of the class is made with."""
    python: FilePath | None = None
    """Interpreter of the processes that it is called in, such as that of a virtual environment with the harness, whose packages
    then need not agree with those of the run. null: the run's own."""
    workers: PositiveInt = 2
    """Processes that it is called in."""
    per_worker: PositiveInt = 64
    """Attempts that one of them plays at a time."""
    start_timeout_s: PositiveFloat = 120.0
    """How long a process may take to import the function."""


class ExternalAgent(AgentEndpoint):
    """Agents from elsewhere, for `ctpo serve-agents`, which ask for a key for each attempt themselves."""

    type: Literal["external"] = "external"
    admin_port: Annotated[NonNegativeInt, Field(le=65_535)] = 0
    """Port where attempts are opened and closed with the run's key. 0: a free one; RUN_DIR/agents.json says which."""
    max_open: PositiveInt = 1024
    """Attempts that may be open at a time; more are refused until one is closed."""


Agent = Annotated[CommandAgent | FunctionAgent | ExternalAgent, Field(discriminator="type")]
