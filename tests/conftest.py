"""Two workers of pytest-xdist (`-n 2`) take the tests by file, but one of them all that start servers, clusters or daemons.

Those look at processes, ports and shared memory of the whole machine, and would see each other's. They also wait for things that
happen in time; so the other worker stands back and takes what they leave of the processors.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest

ALONE = "tests/integration"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadscope`, with files for scopes; the longest scope comes first in `testpaths`, and the order is kept."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ALONE if nodeid.startswith(ALONE) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """In a worker; for everything that it starts too."""
    if hasattr(item.config, "workerinput") and not item.nodeid.startswith(ALONE):
        _stand_back()


@functools.cache
def _stand_back() -> None:
    os.nice(10)
