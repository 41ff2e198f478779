"""What a run's numbers go to: its own files, TensorBoard, and the sinks of the configuration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import StorageError
from ctpo_megatron.jobs.resume import Start
from ctpo_megatron.loop.alarms import Hearing
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.hparams import settings_shown
from ctpo_megatron.record.recorder import Sink
from ctpo_megatron.record.sink_events import PointsLost
from ctpo_megatron.record.sink_feed import SinkFeed
from ctpo_megatron.record.sink_process import RunWords, SinkProcess
from ctpo_megatron.record.storage import Storage


def make_sinks(config: RunConfig, run_dir: Path, *, resumed: bool) -> tuple[SinkProcess, ...]:
    """The sinks that a run asks for; each starts its process with the first that it is given. Close them: `closing_sinks`."""
    about = RunWords(config.name, run_dir, shown(config), resumed)
    return tuple(SinkProcess(each, about) for each in config.log.sinks)


@contextlib.asynccontextmanager
async def closing_sinks(feed: SinkFeed, emit: Emit) -> AsyncIterator[None]:
    """A context in which `feed` may get sinks; they end behind it, and so hear of how the run ended."""
    try:
        yield
    finally:
        await close_sinks(feed.sinks, emit)


async def close_sinks(sinks: Sequence[Sink], emit: Emit) -> None:
    """Let all sinks bring what they have on its way, at the same time and in bounded time, and tell what they lost."""
    await asyncio.gather(*(asyncio.to_thread(sink.close) for sink in sinks))
    for sink in sinks:
        pieces, reason = sink.lost()
        if pieces:
            with contextlib.suppress(StorageError):  # the run is over, and its console has the sentence
                emit(PointsLost(sink.name, pieces, reason))


def make_recorder(
    config: RunConfig,
    run_dir: Path,
    first_step: int,
    sinks: Sequence[Sink],
    emit: Emit,
    storage: Storage,
    *,
    samples: int | None = None,
) -> Recorder:
    """The recorder of a run that goes on behind `first_step`, when `samples` samples were trained on. It writes through
    `storage`, and raises StorageError where the disk does not take what was there."""
    return Recorder(
        run_dir,
        config.log,
        first_step=first_step,
        samples=samples,
        settings=shown(config),
        sinks=sinks,
        emit=emit,
        through=storage.write,
        aside=storage.attempt,
    )


async def open_record(
    config: RunConfig, run_dir: Path, start: Start, sinks: Sequence[Sink], hearing: Hearing, emit: Emit, storage: Storage
) -> RunRecord:
    """The record of a run that goes on behind `start`. Raises StorageError where the disk does not take it."""
    recorder = make_recorder(config, run_dir, start.step, sinks, emit, storage, samples=start.samples)
    alarms = await hearing.alarms_of(config, run_dir, emit, start.alarms)  # of the rows kept
    return RunRecord(run_dir, config.log, recorder, storage.write, alarms)


def shown(config: RunConfig) -> dict[str, Any]:
    """The settings that TensorBoard and sinks compare runs by."""
    return settings_shown(config.model_dump(mode="json"))
