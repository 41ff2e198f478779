"""A Ray of the run's own where there are GPUs: it has an agent less, and its actors still get variables of their own.

A Ctrl-C in a terminal goes to all its processes. It is the driver's to answer.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys

import pytest

from ctpo_megatron.cluster.lean_ray import IDLE

START = """
import os
import signal
import time

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
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
time.sleep(1.0)
print(ray.get(ray.remote(Asked).remote().variable.remote(), timeout=30))  # a new process: the raylet starts it
"""


@pytest.mark.parametrize("more", [[], ["--disable-metrics-collection"]])
def test_what_stands_for_an_agent_lives_as_long_as_its_input(more: list[str]) -> None:
    """Whatever words the raylet adds, and through a Ctrl-C, which a terminal sends to everybody: Ray's own agents block it."""
    idle = subprocess.Popen([*shlex.split(IDLE), *more], stdin=subprocess.PIPE)
    for _ in range(2):
        with pytest.raises(subprocess.TimeoutExpired):
            idle.wait(0.3)
        idle.send_signal(signal.SIGINT)
    idle.communicate(timeout=10)
    assert idle.returncode == 0


def test_actors_on_gpus_have_variables_of_their_own_and_ray_goes_on_after_a_ctrl_c() -> None:
    words = [sys.executable, "-c", START]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, start_new_session=True)
    assert done.stdout.split("\n") == ["is there", "None", ""], done.stderr
