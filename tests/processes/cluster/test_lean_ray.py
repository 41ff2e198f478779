"""A Ray of the run's own where there are GPUs: it has an agent less, and its actors still get variables of their own."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from ctpo_megatron.cluster.lean_ray import IDLE

START = """
import ray
from ctpo_megatron.cluster.lean_ray import HOLDS_THEIR_INPUT, without_idle_processes

class Asked:
    def variable(self):
        import os
        return os.environ.get("OF_ITS_OWN")

with without_idle_processes():
    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=1, num_gpus=1, _system_config=HOLDS_THEIR_INPUT, **quiet)
actor = ray.remote(num_gpus=1, runtime_env={"env_vars": {"OF_ITS_OWN": "is there"}})(Asked).remote()
print(ray.get(actor.variable.remote(), timeout=100))
"""


@pytest.mark.parametrize("more", [[], ["--disable-metrics-collection"]])
def test_what_stands_for_an_agent_lives_as_long_as_its_input(more: list[str]) -> None:
    """Whatever words the raylet adds."""
    idle = subprocess.Popen([*shlex.split(IDLE), *more], stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        idle.wait(0.3)
    idle.communicate(timeout=10)
    assert idle.returncode == 0


def test_actors_on_gpus_have_variables_of_their_own() -> None:
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "is there", done.stderr
