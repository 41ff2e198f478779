"""What a run needs for its agents: the runner of its kind, and the border where a configuration is checked."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.agents.play.command import CommandRunner, check_command
from ctpo_megatron.agents.play.functions import FunctionRunner, check_function
from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.agents.play.runner import AgentRunner
from ctpo_megatron.config.agents import AgentEndpoint, CommandAgent, FunctionAgent, LocalAgent
from ctpo_megatron.errors import ConfigError

DIRECTORY = "agents"  # in RUN_DIR/logs


def make_runner(config: LocalAgent, logs: Path) -> AgentRunner:
    """Returns what plays attempts with the agent of `config`. `logs`: RUN_DIR/logs."""
    kept = AgentLogs(logs / DIRECTORY)
    if isinstance(config, CommandAgent):
        return CommandRunner(config, kept)
    if isinstance(config, FunctionAgent):
        return FunctionRunner(config, kept)
    raise TypeError(f"{type(config).__name__} is no kind of agents that a run starts")


def started_here(config: AgentEndpoint | None) -> LocalAgent | None:
    """Returns `config`, None for none. Raises ConfigError where a run does not start agents of this type itself."""
    if config is None or isinstance(config, LocalAgent):
        return config
    raise ConfigError(
        "rollout.agent.type=external is for `ctpo serve-agents`, which waits for agents from elsewhere; give type command or "
        "function, with which the run starts them itself"
    )


def check_agent(config: AgentEndpoint | None) -> None:
    """Raise ConfigError where a run could not start its agents. Imports a function in a process of its own."""
    agent = started_here(config)
    if isinstance(agent, CommandAgent):
        check_command(agent)
    elif isinstance(agent, FunctionAgent):
        check_function(agent)
