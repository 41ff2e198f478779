"""Kinds of agents, keys of their configuration, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.agents.play.kinds import check_agent, make_runner, started_here
from ctpo_megatron.agents.play.logs import AgentLogs
from ctpo_megatron.agents.play.task import AgentTask, clean, variables
from ctpo_megatron.config.agents import ExternalAgent, FunctionAgent
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.journal import recipe

CONFIGS = Path(__file__).resolve().parents[4] / "configs"


def config(*overrides: str) -> Any:
    return load_config(CONFIGS / "quickstart_agent.yaml", list(overrides))


def test_the_shipped_configuration_has_an_agent_and_no_tool() -> None:
    rollout = config().rollout
    assert isinstance(rollout.agent, FunctionAgent)
    assert rollout.tool is None
    assert load_config(CONFIGS / "quickstart_agent_sft.yaml", []).rollout.agent is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.tool={type: calculator}"], "agents bring their own tools; set rollout.tool=null"),
        (["rollout.agent={type: command, command: []}"], "rollout.agent.command"),
        (["rollout.agent={type: function, path: no/function}"], "rollout.agent.path"),
        (["rollout.agent={type: external, port: 70000}"], "rollout.agent.port"),
        (["rollout.agent.timeout=3"], "timeout_s"),
        (["rollout.agent.host=0.0.0.0"], "give that of one interface"),
        (["rollout.agent={type: comand}"], "command"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(*overrides)
    assert words in str(refused.value)


def test_a_run_starts_no_agents_from_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ctpo serve-agents"):
        check_agent(ExternalAgent())
    assert started_here(None) is None
    check_agent(None)
    with pytest.raises(TypeError):
        make_runner(ExternalAgent(), tmp_path)  # type: ignore[arg-type]


def test_attempts_are_another_agents_only_where_it_plays_otherwise() -> None:
    same = recipe(config())
    assert recipe(config("rollout.agent.workers=1", "rollout.agent.port=4711", "rollout.agent.log_kb=1")) == same
    assert recipe(config("rollout.agent.path=other.module:play")) != same
    assert recipe(config("rollout.agent.on_failure=retry")) != same


def test_what_an_agent_gets_of_the_environment() -> None:
    given = {"PATH": "/bin", "LC_ALL": "C", "AWS_SECRET_ACCESS_KEY": "s", "OPENAI_API_KEY": "the user's own", "HF_TOKEN": "t"}
    assert clean(given) == {"PATH": "/bin", "LC_ALL": "C"}
    assert clean(given, ["HF_TOKEN"]).keys() == {"PATH", "LC_ALL", "HF_TOKEN"}
    task = AgentTask("http://h/a/v1", "http://h/a", "sk-k", "m", [{"role": "user", "content": "q"}], "g00000000.0", 5.0)
    told = variables(task)
    assert (told["OPENAI_BASE_URL"], told["ANTHROPIC_BASE_URL"]) == ("http://h/a/v1", "http://h/a")
    assert {told["OPENAI_API_KEY"], told["ANTHROPIC_API_KEY"]} == {"sk-k"}


def test_logs_are_of_the_newest_attempts_and_never_an_attempts_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs = AgentLogs(tmp_path / "agents", kept=3)
    logs.write("a0", "")
    assert not (tmp_path / "agents").exists()
    for number in range(5):
        logs.write(f"a{number}", f"said {number}")
    logs.write("a4", "again\n")
    assert sorted(path.name for path in (tmp_path / "agents").iterdir()) == ["a2.log", "a3.log", "a4.log"]
    assert (tmp_path / "agents" / "a4.log").read_text() == "said 4\nagain\n"
    AgentLogs(tmp_path / "agents", kept=3).write("a5", "after a restart")
    assert len(list((tmp_path / "agents").iterdir())) == 3
    AgentLogs(tmp_path / "agents" / "a5.log" / "below").write("a6", "nowhere")
    assert "is not kept" in caplog.text
