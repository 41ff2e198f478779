"""Every example is a configuration that loads, names what there is, and stands in the table of examples."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.agents import CommandAgent, FunctionAgent
from ctpo_megatron.config.environments import WorldEnvironment
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.rewards import FunctionReward, parts
from tests.support.examples import EXAMPLES

ROOT = EXAMPLES.parent
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))
MADE = ("runs/", ".venv/", ".venv-verifiers/")  # by what the table names beside them


def imported(config: RunConfig) -> Iterator[str]:
    """The objects that a run would import by their names."""
    rollout = config.rollout
    if isinstance(rollout.environment, WorldEnvironment):
        yield rollout.environment.path
    if isinstance(rollout.agent, FunctionAgent):
        yield rollout.agent.path
    yield from (part.function for _, part in parts(rollout.reward) if isinstance(part, FunctionReward))


def files(config: RunConfig) -> Iterator[str]:
    """The paths that a run would open or start."""
    yield from (path for path in (config.model.path, config.data.train, config.data.eval) if path is not None)
    agent = config.rollout.agent
    if isinstance(agent, CommandAgent):
        yield from (word for word in agent.command if "/" in word)
    if isinstance(agent, FunctionAgent) and agent.python is not None:
        yield agent.python


def missing(config: RunConfig) -> list[str]:
    """What the configuration names and nothing makes. Nothing is imported: harnesses take seconds."""
    found = [path for path in files(config) if not path.startswith(MADE) and not (ROOT / path).exists()]
    for path in imported(config):
        module, _, name = path.partition(":")
        file = ROOT / f"{module.replace('.', '/')}.py"
        nodes = ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else []
        if name not in {getattr(node, "name", None) for node in nodes}:
            found.append(path)
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_an_example_names_what_there_is(path: Path) -> None:
    assert missing(load_config(path)) == []


def test_a_name_that_is_wrong_is_found() -> None:
    def of(*overrides: str) -> list[str]:
        return missing(load_config(EXAMPLES / "math.yaml", list(overrides)))

    assert of("model.path=runs/x", "data.train=examples/none.jsonl") == ["examples/none.jsonl"]
    for path in ("examples.guess:None_", "examples.none:Guess"):
        assert of(f"rollout.environment={{type: world, path: '{path}'}}") == [path]
        assert of(f"rollout.agent={{type: function, path: '{path}'}}") == [path]
    assert of("rollout.agent={type: command, command: [examples/none.py]}") == ["examples/none.py"]


def test_the_table_has_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.*") if f"]({path.name})" not in table and path.name not in UNLISTED] == []


UNLISTED = {"README.md", "guess_sft.yaml", "sums_sft.yaml"}  # itself; cold starts that guess.py and sums.py call
