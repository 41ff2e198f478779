"""Two workers of pytest-xdist (`-n 2`) take the tests by file; files that start servers or daemons, but one, go to one worker.

Those look at processes, ports and daemons of the whole machine, and would see each other's. They also wait for things that happen
in time; so the other worker stands back and takes what they leave of the processors. It would have nothing left to do long before
the first one has, so it begins with files of servers that look at nothing but their own run, and have time.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from ctpo_megatron.engine.sglang.imports import hide_kernels

# how long an example takes depends on what else the host does; pytest bounds every test
settings.register_profile("any host", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any host")

hide_kernels()  # every process that looks for tests would import them, for a second and more

ALONE = "tests/integration"
NICENESS = 4  # of the other worker: a third of the first one's share where both want all, and still a share beside other work
_OWN_RUN_ONLY = "weights_dense weights chaos attest sglang_families placement publication evaluate many_servers"
BESIDE = tuple(f"tests/integration/test_{name}.py" for name in _OWN_RUN_ONLY.split())


def runs_alone(nodeid: str) -> bool:
    """Whether a test belongs to the one worker whose tests do not run beside each other."""
    return nodeid.startswith(ALONE) and not nodeid.startswith(BESIDE)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What tests import is no garbage: looking for some meanwhile, and at all of it later, would take a fifth of their time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadscope`, with files for scopes; the longest scope comes first in `testpaths`, and the order is kept."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ALONE if runs_alone(nodeid) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The worker that takes the tests of servers has them from the start, and is never the one that stands back."""
    items.sort(key=lambda item: not runs_alone(item.nodeid))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In a worker; for everything that it starts too."""
    if hasattr(item.config, "workerinput") and not runs_alone(item.nodeid):
        _stand_back()


@functools.cache
def _stand_back() -> None:
    os.nice(NICENESS)
