"""What a plan says of a run's agents: how many play at once, where they are served, and what bounds one attempt."""

from __future__ import annotations

import ipaddress

from ctpo_megatron.agents.play.command import check_command
from ctpo_megatron.agents.play.environment import GRACE_S
from ctpo_megatron.agents.play.kinds import started_here
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.agents import CommandAgent, FunctionAgent, LocalAgent
from ctpo_megatron.errors import ConfigError

Row = tuple[str, str, str]


def agent_rows(config: RunConfig) -> list[Row]:
    """Returns what is planned for the agents of `config`, none where it has none. Raises ConfigError for agents from elsewhere.

    No agent is started or imported: a plan may be made on another machine than the run's.
    """
    agent = started_here(config.rollout.agent)
    if agent is None:
        return []
    return [_program(agent), _at_once(config, agent), _endpoint(agent), *_bounds(config, agent), _failure(config, agent)]


def _program(agent: LocalAgent) -> Row:
    if isinstance(agent, CommandAgent):
        try:
            check_command(agent)
        except ConfigError as error:
            return "command", agent.command[0], f"not on this machine: {str(error).partition(': ')[2]}"
        return "command", agent.command[0], "on this machine; a process of its own for each attempt"
    assert isinstance(agent, FunctionAgent), "a kind of agents that a run starts"
    python = "the run's interpreter" if agent.python is None else agent.python
    return "function", agent.path, f"in {_count(agent.workers, 'process', 'es')} of {python}"


def _at_once(config: RunConfig, agent: LocalAgent) -> Row:
    asked = config.rollout.concurrency
    told = f"rollout.concurrency {asked:,}"
    if not isinstance(agent, FunctionAgent):
        return "at once", _count(asked, "attempt"), f"{told}: as many processes on the driver's node"
    places = agent.workers * agent.per_worker
    each = f"{agent.workers} x {agent.per_worker}"
    wait = f"; {asked - places:,} wait for a place" if places < asked else ""
    return "at once", _count(min(asked, places), "attempt"), f"{told}; workers x per_worker {each}{wait}"


def _endpoint(agent: LocalAgent) -> Row:
    address = f"{agent.host} port {agent.port}" if agent.port else f"{agent.host}, a free port"
    inside = _is_loopback(agent.host)
    reach = "reached from the driver's node alone" if inside else "reached from other hosts, unencrypted, with an attempt's key"
    return "endpoint", address, reach


def _bounds(config: RunConfig, agent: LocalAgent) -> list[Row]:
    rollout = config.rollout
    limit_s = min(agent.timeout_s, rollout.deadline_s or agent.timeout_s)
    key = "rollout.agent.timeout_s" if limit_s == agent.timeout_s else "rollout.deadline_s"
    places = agent.workers * agent.per_worker if isinstance(agent, FunctionAgent) else rollout.concurrency
    each = -(-min(rollout.concurrency, places) // rollout.engine.servers)
    rate = each * rollout.max_response_tokens / limit_s
    one = "; one that calls a tool has no answer" if rollout.max_turns == 1 else ""
    words = "data.max_prompt_tokens and rollout.max_response_tokens: instructions, tools, turns"
    return [
        ("attempt", _count(rollout.max_turns, "turn"), f"rollout.max_turns, those of branches too{one}"),
        ("", f"{config.data.max_prompt_tokens + rollout.max_response_tokens:,} tokens", words),
        ("", f"{limit_s:,.0f} s", f"{key}, and {GRACE_S:g} s to end; at least {rate:,.0f} tokens/s per server"),
    ]


def _failure(config: RunConfig, agent: LocalAgent) -> Row:
    if agent.on_failure == "judge":
        return "failed", "judged", "made anew where nothing was sampled"
    retries = config.rollout.retries
    anew = f"made anew, {_count(retries, 'time')}" if retries else "not made anew"
    return "failed", anew, f"then its group is replaced; more than {config.rollout.failed_share:.0%} of such attempts end the run"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _count(number: int, word: str, more: str = "s") -> str:
    return f"{number:,} {word}{'' if number == 1 else more}"
