"""What a run needs for its agents: the runner of its kind, and the border where a configuration is checked."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.agents.play.command import CommandRunner, check_command
from ctpo_megatron.agents.play.functions import FunctionRunner, check_function
from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.agents.play.runner import AgentRunner
from ctpo_megatron.config.agents import CommandAgent, ExternalAgent, FunctionAgent
from ctpo_megatron.errors import ConfigError

DIRECTORY = "agents"  # in RUN_DIR/logs


def make_runner(config: CommandAgent | FunctionAgent, logs: Path) -> AgentRunner:
    """Returns what plays attempts with the agent of `config`. `logs`: RUN_DIR/logs."""
    kept = AgentLogs(logs / DIRECTORY)
    if isinstance(config, CommandAgent):
        return CommandRunner(config, kept)
    return FunctionRunner(config, kept)


def check_agent(config: CommandAgent | FunctionAgent | ExternalAgent | None) -> None:
    """Raise ConfigError where a run could not start its agents. Imports a function in a process of its own."""
    if isinstance(config, CommandAgent):
        check_command(config)
    elif isinstance(config, FunctionAgent):
        check_function(config)
    elif config is not None:
        raise ConfigError(
            "rollout.agent.type=external is for `ctpo serve-agents`, which waits for agents from elsewhere; give type command "
            "or function, with which the run starts them itself"
        )
