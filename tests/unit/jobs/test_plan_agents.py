"""What a plan says of agents: how many play at once, who is refused, and what bounds an attempt."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.plan import plan_job
from ctpo_megatron.jobs.plan_agents import agent_rows
from ctpo_megatron.planning.plan import Hardware

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def rows(*overrides: str) -> dict[str, tuple[str, str]]:
    found, name = {}, ""
    for label, value, words in agent_rows(load_config(CONFIGS / "quickstart_agent.yaml", list(overrides))):
        name = label or f"{name}'"
        found[name] = value, words
    return found


def command(word: str) -> str:
    return f"rollout.agent={{type: command, command: [{word}]}}"


def test_the_table_of_a_plan() -> None:
    where, console = CONFIGS / "quickstart_agent.yaml", Console(file=io.StringIO(), width=120)
    config = load_config(where, ["cluster.device=cpu", "rollout.concurrency=40"])
    plan_job(config, where, CONFIGS / "models" / "qwen3-4b", Hardware(), console)
    said = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    table = said[said.index("Agents") :]
    assert "at once 40 attempts rollout.concurrency 40; workers x per_worker 2 x 64" in table
    assert "endpoint 127.0.0.1, a free port reached from the driver's node alone" in table
    assert any("whether the agent's function can be imported" in line for line in table)


def test_places_and_processes() -> None:
    assert rows("rollout.concurrency=200")["at once"] == (
        "128 attempts",
        "rollout.concurrency 200; workers x per_worker 2 x 64; 72 wait for a place",
    )
    told = rows(command("sh"), "rollout.concurrency=8")
    assert told["at once"] == ("8 attempts", "rollout.concurrency 8: as many processes on the driver's node")
    assert told["command"] == ("sh", "on this machine; a process of its own for each attempt")
    assert rows(command("no-such-program"))["command"][1].startswith("not on this machine: there is no program")


def test_bounds_of_an_attempt() -> None:
    told = rows("rollout.deadline_s=64", "rollout.engine.servers=2", "rollout.max_turns=1")
    assert told["attempt"][1].endswith("one that calls a tool has no answer")
    assert told["attempt''"] == ("64 s", "rollout.deadline_s, and 5 s to end; at least 192 tokens/s per server")
    assert rows("rollout.agent.timeout_s=60", "rollout.deadline_s=64")["attempt''"][1].startswith("rollout.agent.timeout_s")
    assert rows("rollout.agent.on_failure=retry", "rollout.retries=1")["failed"][0] == "made anew, 1 time"
    for host, words in (("::1", "alone"), ("localhost", "alone"), ("10.0.0.7", "unencrypted"), ("node-1", "unencrypted")):
        assert words in rows(f"rollout.agent.host='{host}'")["endpoint"][1]


def test_who_is_no_agent_of_a_run() -> None:
    assert agent_rows(load_config(CONFIGS / "quickstart.yaml")) == []
    where = CONFIGS / "quickstart_agent.yaml"
    config = load_config(where, ["rollout.agent={type: external}"])
    with pytest.raises(ConfigError, match="ctpo serve-agents"):
        plan_job(config, where, CONFIGS / "models" / "qwen3-4b", Hardware(), Console(file=io.StringIO()))
