"""What the processes of a run and the driver's host use, under the record's names, once a step."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from ctpo_megatron.record.slope import Slope

GIB = 2**30
SHOWN = 64  # servers, and trainer ranks, that are shown one by one
_SERVER = re.compile(r"inference server (\d+)")
_RANK = re.compile(r"trainer rank \d+")


class Resources:
    """Reads memory, CPUs and disk. `clock`: seconds, for slopes."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._driver = run_dir, psutil.Process()
        self._slopes: defaultdict[str, Slope] = defaultdict(lambda: Slope(clock))
        psutil.cpu_percent()  # from now on

    def metrics(self, memory: Mapping[str, int]) -> dict[str, float]:
        """Returns the metrics. `memory`: resident bytes by process, as the watch of the run calls them."""
        found = {"host/cpu": psutil.cpu_percent() / 100}
        with contextlib.suppress(OSError):  # it may be away
            found["host/disk_free"] = shutil.disk_usage(self._run_dir).free / GIB
        host = psutil.virtual_memory()
        found["host/memory_used"] = 1 - host.available / host.total
        found |= self._grown("host/{}", "", host.total - host.available)
        found |= self._grown("host/driver_{}", "", self._driver.memory_info().rss)
        servers: dict[str, int] = defaultdict(int)  # one may be on several nodes
        for name, size in memory.items():
            if server := _SERVER.match(name):
                servers[server[1]] += size
        for number, size in servers.items():
            if int(number) < SHOWN:
                found |= self._grown("servers/{}", f"/server_{number}", size)
        return found | self._trainer({name: size for name, size in memory.items() if _RANK.match(name)})

    def _trainer(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Returns those of the rank that has most, and of the one that grows fastest."""
        slopes = [self._slopes[name].read(size / GIB) for name, size in ranks.items()]
        known = [slope for slope in slopes if slope is not None]
        found = {"host/trainer_memory": max(ranks.values()) / GIB} if ranks else {}
        return found | ({"host/trainer_memory_slope": max(known)} if known else {})

    def _grown(self, name: str, of: str, size: int) -> dict[str, float]:
        """Returns a size, and how fast it grows where that is known."""
        memory = name.format("memory") + of
        slope = self._slopes[memory].read(size / GIB)
        return {memory: size / GIB} | ({} if slope is None else {name.format("memory_slope") + of: slope})
