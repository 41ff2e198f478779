"""Lets a Ray cluster that is started for one run on one host start only the processes that the run uses.

`ray.init` of Ray 2.60 also starts an autoscaler, which has nothing to add to one host; a monitor of logs, whose one reader would
be the driver (`log_to_driver`); and the head of a dashboard that is turned off, for Ray's usage statistics, whose answer it
waits for. Together they cost two seconds of a processor at each start. `ray.init` has no words for this; `ray start` has
`--no-monitor` and `--include-log-monitor` for the first two.

The raylet wants two agents, and ends with the first of them: two more seconds. One serves the dashboard and collects metrics. The
other prepares variables and packages of workers that have some of their own: on GPUs (`cluster.environment`), and where Ray gives
the driver's to all (`uv run`, a hook, a submitted job). Where nobody asks them, `cat` takes their place: it lives as long as the
raylet holds its input. A Ctrl-C in a terminal, which goes to all processes of the command, is the driver's to answer: `cat` does
not hear it. That nobody listens is said in Ray's own word for it, which it has where it is installed without its
dashboard. tests/unit/cluster/test_lean_ray.py tells when all that has changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from ray import _raylet
from ray._private import node as ray_node
from ray._private import ray_constants, services, utils
from ray._private.runtime_env import constants, uv_runtime_env_hook

_native: Any = _raylet  # whose types say less than it has

NO_PORT = -1  # Ray's own word for it
IDLE = "sh -c 'trap \"\" INT; exec cat'"  # does nothing until its input ends, whatever words the raylet adds
DASHBOARD_AGENT, ENVIRONMENT_AGENT = "dashboard_agent", "runtime_env_agent"
GIVE_AN_ENVIRONMENT = (ray_constants.RAY_RUNTIME_ENV_HOOK, constants.RAY_JOB_CONFIG_JSON_ENV_VAR)
PORTS = {  # which an agent tells the raylet, which waits for them
    DASHBOARD_AGENT: (
        _native.METRICS_AGENT_PORT_NAME,
        _native.METRICS_EXPORT_PORT_NAME,
        _native.DASHBOARD_AGENT_LISTEN_PORT_NAME,
    ),
    ENVIRONMENT_AGENT: (_native.RUNTIME_ENV_AGENT_PORT_NAME,),
}
# of Ray, without which an idle agent would have no input, and outlive a raylet that was killed
HOLDS_THEIR_INPUT = {"enable_pipe_based_agent_to_parent_health_check": True}


class LeanNode(ray_node.Node):
    """Ray's head node with its GCS and its raylet, and with an agent for workers' variables where one is asked."""

    def start_monitor(self) -> None:
        """Start no autoscaler."""

    def start_log_monitor(self) -> None:
        """Start nobody who reads the workers' logs."""

    def start_api_server(self, **_: Any) -> None:
        """Start no dashboard."""

    def start_raylet(self, *args: Any, **kwargs: Any) -> None:
        """Start the raylet with agents that do nothing where nobody asks them."""
        asked = self.get_resource_and_label_spec().num_gpus or all_workers_have_an_environment()
        idle = (DASHBOARD_AGENT,) if asked else (DASHBOARD_AGENT, ENVIRONMENT_AGENT)
        for port in (port for agent in idle for port in PORTS[agent]):
            _native.persist_port(self._session_dir, self._node_id, port, NO_PORT)
        with _idle_agents(idle):
            super().start_raylet(*args, **kwargs)


def all_workers_have_an_environment() -> bool:
    """Whether `ray.init` gives all workers variables or packages: under `uv run`, by a hook, or in a submitted job."""
    under_uv = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV and uv_runtime_env_hook._get_uv_run_cmdline() is not None
    return under_uv or any(name in os.environ for name in GIVE_AN_ENVIRONMENT)


@contextlib.contextmanager
def _idle_agents(names: tuple[str, ...]) -> Iterator[None]:
    """While this context is open, Ray starts its raylet with IDLE for these agents."""
    start, has_dashboard = services.start_ray_process, utils.get_dashboard_dependency_error
    options = tuple(f"--{name}_command=" for name in names)

    def start_raylet(command: list[str], *args: Any, **kwargs: Any) -> Any:
        return start([_idle(word, options) for word in command], *args, **kwargs)

    services.start_ray_process = start_raylet
    utils.get_dashboard_dependency_error = lambda: None  # it would import all that a dashboard needs
    try:
        yield
    finally:
        services.start_ray_process = start
        utils.get_dashboard_dependency_error = has_dashboard


def _idle(word: str, options: tuple[str, ...]) -> str:
    """`word` of a raylet's command line, with IDLE as the value of one of `options`."""
    return next((option + IDLE for option in options if word.startswith(option)), word)


@contextlib.contextmanager
def without_idle_processes() -> Iterator[None]:
    """While this context is open, `ray.init` starts a LeanNode."""
    before = ray_node.Node
    ray_node.Node = LeanNode
    try:
        yield
    finally:
        ray_node.Node = before
