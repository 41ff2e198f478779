"""A Ray of the run's own starts nothing that the run does not use; tests/integration/test_train.py looks at whole runs."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import ray
from ray._private import node as ray_node
from ray._private import services, utils

from ctpo_megatron.cluster.lean_ray import DASHBOARD_AGENT, ENVIRONMENT_AGENT, LeanNode, _idle_agents, without_idle_processes

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


@pytest.mark.parametrize("gpus", [0, 1])
def test_agents_that_nobody_asks_do_nothing(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """The one for workers' variables is asked where there are GPUs. Ray's own functions are back afterwards."""
    words = ["raylet", f"--{DASHBOARD_AGENT}_command=python a.py", f"--{ENVIRONMENT_AGENT}_command=python b.py", "--head"]
    started: list[list[str]] = []
    monkeypatch.setattr(services, "start_ray_process", lambda command, *_, **__: started.append(command))
    before = (services.start_ray_process, utils.get_dashboard_dependency_error)
    with _idle_agents((DASHBOARD_AGENT, *(() if gpus else (ENVIRONMENT_AGENT,)))):
        services.start_ray_process(words, "raylet", fate_share=True)
    assert (services.start_ray_process, utils.get_dashboard_dependency_error) == before
    left = words[2] if gpus else f"--{ENVIRONMENT_AGENT}_command=cat"
    assert started == [["raylet", f"--{DASHBOARD_AGENT}_command=cat", left, "--head"]]


@pytest.mark.parametrize("agent", [DASHBOARD_AGENT, ENVIRONMENT_AGENT])
def test_ray_still_has_the_raylet_start_it(agent: str) -> None:
    """Whether a raylet comes up with what is in its place is shown by every start of a Ray here, as in test_ray_start.py."""
    source = inspect.getsource(services.start_raylet)
    assert f'"--{agent}_command={{}}"' in source
    assert "start_ray_process(" in source
    assert "get_dashboard_dependency_error()" in source
