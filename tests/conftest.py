"""Three workers of pytest-xdist (`-n 3`) take the tests by file, on two processors: a run waits for a third of its time.

Files that start one server after the other, or a run that has to notice something in time, go to one worker, one after another.
The other two stand back and take what it leaves of the processors. They begin with the longest: runs and servers that look at
nothing but themselves, and have time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# how long an example takes depends on what else the host does; pytest bounds every test
settings.register_profile("any host", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("glance", settings.get_profile("any host"), max_examples=10)  # `--hypothesis-profile`; see `often`
settings.load_profile("any host")

ALONE = "tests/integration"
NICENESS = 4  # of the other workers: a third of the first one's share where both want all, and still a share beside other work
_OWN_RUN_ONLY = (
    "chaos slurm elastic weights_dense weights publication publication_hangs sglang_ends attest sglang_families placement "
    "evaluate many_servers"
)
STANDS_BACK = pytest.StashKey[bool]()
BESIDE = tuple(f"tests/integration/test_{name}.py" for name in _OWN_RUN_ONLY.split())


def runs_alone(nodeid: str) -> bool:
    """Whether a test belongs to the one worker that never stands back."""
    return nodeid.startswith(ALONE) and not nodeid.startswith(BESIDE)


def pytest_configure(config: pytest.Config) -> None:
    """What looks for tests is spared kernels that it would import for a second; a process that hands tests out looks for none."""
    if not config.getoption("numprocesses", None):
        from ctpo_megatron.engine.sglang.imports import hide_kernels

        hide_kernels()


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
    """A worker stands back or does not by its first test, and so does everything that it starts."""
    if hasattr(item.config, "workerinput") and STANDS_BACK not in item.config.stash:
        item.config.stash[STANDS_BACK] = not runs_alone(item.nodeid)
        if item.config.stash[STANDS_BACK]:
            os.nice(NICENESS)
