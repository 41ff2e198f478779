"""The servers of teachers that a run starts: placed, watched and started again as those that sample, with weights that stay."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from ctpo_megatron.cluster.engines.group import EngineGroup
from ctpo_megatron.cluster.placement import ServerPlacement
from ctpo_megatron.cluster.watch.watchdog import Watchdog
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.distillation import StartedTeacher, engine_section
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.record.events import Emit


def started_teachers(config: RunConfig) -> dict[int, StartedTeacher]:
    """Returns the teachers whose servers a run of `config` starts, by their places."""
    return {} if config.algorithm.distillation is None else config.algorithm.distillation.started


def teacher_fleets(config: RunConfig, emit: Emit) -> dict[int, Fleet]:
    """Returns an empty fleet for each of them: its servers serve as soon as they answer."""
    found = {}
    for place, teacher in started_teachers(config).items():
        engine, setting = teacher.engine, f"{engine_section(place)}.restarts"
        patience = engine.start_timeout_s
        found[place] = Fleet(patience_s=patience, restarts=engine.restarts, fixed_version=0, emit=emit, setting=setting)
    return found


class TeacherServers:
    """The servers of all these teachers, launched on construction: `fleets`, `api_key` and `places` are theirs, in one order."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        api_key: str,
        places: list[list[ServerPlacement]],
        fleets: dict[int, Fleet],
        *,
        nursery: str,
        environment: dict[str, Any],
        watchdog: Watchdog | None,
    ) -> None:
        self._groups = [
            EngineGroup(
                _as_sampled(config, teacher),
                run_dir,
                api_key,
                own,
                fleets[place],
                nursery=nursery,
                environment=environment,
                watchdog=watchdog,
                name=f"server of teacher {teacher.name}",
                log=f"teacher_{teacher.name}",
                section=engine_section(place),
            )
            for (place, teacher), own in zip(started_teachers(config).items(), places, strict=True)
        ]

    async def start(self) -> None:
        """Wait until all of them answer. Raises as `EngineGroup.start` does."""
        await asyncio.gather(*(group.start() for group in self._groups))

    @property
    def watches(self) -> list[Coroutine[Any, Any, None]]:
        """Returns what raises ProcessDied when all servers of a teacher are lost for good; for each teacher one."""
        return [group.watch() for group in self._groups]

    async def close(self) -> None:
        """End all of them; `Runtime.close` bounds it."""
        await asyncio.gather(*(group.close() for group in self._groups))


def _as_sampled(config: RunConfig, teacher: StartedTeacher) -> RunConfig:
    """Returns the configuration of a run whose servers sample from the teacher."""
    model = config.model.model_copy(update={"path": teacher.path, "adapter": None})
    rollout = config.rollout.model_copy(update={"engine": teacher.engine.as_engine()})
    return config.without_trainer.model_copy(update={"model": model, "rollout": rollout})
