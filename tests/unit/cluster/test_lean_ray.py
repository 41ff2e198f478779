"""A Ray of the run's own starts nothing that the run does not use; tests/integration/test_train.py looks at whole runs."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import ray
from ray._private import node as ray_node
from ray._private import services, utils
from ray._private.runtime_env import uv_runtime_env_hook

from ctpo_megatron.cluster import lean_ray
from ctpo_megatron.cluster.lean_ray import (
    DASHBOARD_AGENT,
    ENVIRONMENT_AGENT,
    GIVE_AN_ENVIRONMENT,
    IDLE,
    PORTS,
    LeanNode,
    without_idle_processes,
)

LEFT_OUT = ("start_monitor", "start_log_monitor", "start_api_server")


@pytest.mark.parametrize("name", LEFT_OUT)
def test_ray_still_starts_it_in_a_method_of_that_name(name: str) -> None:
    """And LeanNode takes each call that Ray makes of it."""
    theirs, ours = (inspect.signature(getattr(each, name)).parameters for each in (ray_node.Node, LeanNode))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values()):
        assert all(parameter.kind is parameter.KEYWORD_ONLY for key, parameter in theirs.items() if key != "self")
    else:
        assert theirs.keys() == ours.keys()


def test_ray_init_still_has_no_word_for_it() -> None:
    """Once it has, cluster/lean_ray.py can go."""
    assert not [key for key in inspect.signature(ray.init).parameters if "monitor" in key]


def test_ray_starts_a_lean_node_inside_it_only() -> None:
    before = ray_node.Node
    with contextlib.suppress(OSError), without_idle_processes():
        inside = ray_node.Node
        raise OSError
    assert inside is LeanNode
    assert ray_node.Node is before


WORDS = ["raylet", f"--{DASHBOARD_AGENT}_command=python a.py", f"--{ENVIRONMENT_AGENT}_command=python b.py", "--head"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a LeanNode, once `start_raylet` is called, has started: `command`; and `ports` that the raylet need not wait for."""
    found: dict[str, object] = {"ports": set()}
    monkeypatch.setattr(services, "start_ray_process", lambda command, *_, **__: found.update(command=command))
    monkeypatch.setattr(ray_node.Node, "start_raylet", lambda *_, **__: services.start_ray_process(WORDS, "raylet"))
    monkeypatch.setattr(lean_ray._native, "persist_port", lambda _directory, _node, name, _port: found["ports"].add(name))
    return found


def lean_node(gpus: int) -> LeanNode:
    node = object.__new__(LeanNode)  # Ray's __init__ starts all
    node._session_dir, node._node_id = "session", "node"
    node.get_resource_and_label_spec = lambda: SimpleNamespace(num_gpus=gpus)
    return node


@pytest.mark.parametrize("asked", ["", "gpus", "uv run", *GIVE_AN_ENVIRONMENT])
def test_agents_that_nobody_asks_do_nothing(started: dict[str, object], monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """Nobody asks the dashboard's. The one for workers' variables is asked on GPUs, and where all workers are given some."""
    monkeypatch.setattr(uv_runtime_env_hook, "_get_uv_run_cmdline", lambda: ["uv", "run"] if asked == "uv run" else None)
    for name in GIVE_AN_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    if asked in GIVE_AN_ENVIRONMENT:
        monkeypatch.setenv(asked, "given")
    before = (services.start_ray_process, utils.get_dashboard_dependency_error)
    lean_node(gpus=int(asked == "gpus")).start_raylet()
    assert (services.start_ray_process, utils.get_dashboard_dependency_error) == before, "Ray's own functions are back"
    left = WORDS[2] if asked else f"--{ENVIRONMENT_AGENT}_command={IDLE}"
    assert started["command"] == ["raylet", f"--{DASHBOARD_AGENT}_command={IDLE}", left, "--head"]
    assert started["ports"] == {*PORTS[DASHBOARD_AGENT], *(() if asked else PORTS[ENVIRONMENT_AGENT])}


@pytest.mark.parametrize("agent", [DASHBOARD_AGENT, ENVIRONMENT_AGENT])
def test_ray_still_has_the_raylet_start_it(agent: str) -> None:
    """Whether a raylet comes up with what is in its place is shown by every start of a Ray here, as in test_ray_start.py."""
    source = inspect.getsource(services.start_raylet)
    assert f'"--{agent}_command={{}}"' in source
    assert "start_ray_process(" in source
    assert "get_dashboard_dependency_error()" in source
