"""A Ray of the run's own starts nothing that the run does not use; tests/integration/test_train.py looks at whole runs."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import ray
from ray._private import node as ray_node

from ctpo_megatron.cluster.lean_ray import LeanNode, without_idle_processes

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
