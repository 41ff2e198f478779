"""A server on a CPU that gives its memory back and takes it again: what the system gets, and that nothing stale is served."""

from __future__ import annotations

import asyncio
import inspect
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctpo_megatron.engine.fleet import MEMORY, State
from ctpo_megatron.record.events import Event, ServerServing, ServerSuspended
from ctpo_megatron.weights.protocol import Sent
from ctpo_megatron.weights.publisher import WeightPublisher
from tests.support.engines import TIMEOUT_S, RunningServer, in_flight
from tests.support.publishing import LocalTrainer, check_against, perturbed, publishing, sample

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

KV_CACHE = 65_536 * 2 * 2 * 4 * 16 * 4  # bytes: tokens, keys and values, layers, heads, their size, float32


class Forgetful(LocalTrainer):
    """Can leave out the sending, with digests as if it had sent."""

    last: Sent | None = None
    forget = False

    async def publish(self, version: int) -> Sent:
        if not self.forget:
            self.last = await super().publish(version)
        self.forget = False
        return replace(self.last, version=version)


def test_a_server_sleeps(server: RunningServer, qwen3: Path) -> None:
    """Its memory goes back; a generation in flight keeps its tokens; weights that are not sent again are noticed, and mended."""

    events: list[Event] = []

    async def scenario() -> None:
        model = perturbed(qwen3, seed=3)
        async with publishing(server, model, events.append) as (client, plain):
            trainer = Forgetful(plain._trainer._sender, model)
            publisher = WeightPublisher(
                client.fleet, client.control, trainer, server.proof(), api_key=server.api_key, timeout_s=TIMEOUT_S, release=True
            )
            await publisher.publish(40)
            running = asyncio.ensure_future(sample(client, 1.0, tokens=1500, stop=()))  # it must not end before it is met
            await in_flight(server.url, server.api_key, running=1)
            before = server.rss_bytes()
            await publisher.offload()
            given_back = before - server.rss_bytes()
            assert 0.8 * KV_CACHE < given_back < 1.5 * KV_CACHE
            (member,) = client.fleet.members(*State)
            assert (member.state, member.given_back) == (State.SLEEPING, MEMORY)
            metrics = await publisher.publish(41)
            assert metrics["publish/wake"] > 0
            assert (member.state, member.given_back) == (State.SERVING, frozenset())
            generation = await running
            assert 0 < generation.versions.count(40) < len(generation.versions)
            check_against(model, generation, 1.0)
            events.clear()
            await publisher.offload()
            trainer.forget = True
            await publisher.publish(42)
            suspended, serving = events
            assert isinstance(suspended, ServerSuspended)
            assert " holds something else than was sent" in suspended.reason
            assert serving == ServerServing("server", 42)
            check_against(model, await sample(client, 1.0), 1.0)

    asyncio.run(scenario())


def test_only_whole_pages_of_its_own_are_given_back(tmp_path: Path) -> None:
    """Neighbours of a tensor in its first and last page stay; so does memory that others see, and what a file holds."""
    from ctpo_megatron.engine.sglang.sleep import give_back  # here: not every process that looks for tests is to import SGLang

    size = 64 * mmap.PAGESIZE
    own = torch.ones(size, dtype=torch.uint8)
    shared = torch.ones(size, dtype=torch.uint8).share_memory_()
    (tmp_path / "file").write_bytes(b"\1" * size)
    mapped = torch.from_file(str(tmp_path / "file"), shared=False, size=size, dtype=torch.uint8)
    mapped[0] = 2
    first = own.data_ptr() + 100
    give_back([(each, each + size - 200) for each in (first, shared.data_ptr(), mapped.data_ptr())])
    kept = own.nonzero().squeeze(-1) + own.data_ptr()
    begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, (first + size - 200) // mmap.PAGESIZE * mmap.PAGESIZE
    assert len(kept) == size - (end - begin)
    assert not ((kept >= begin) & (kept < end)).any()
    assert shared.all()
    assert mapped[0] == 2


def test_the_hooks_are_needed() -> None:
    """When this fails, SGLang sleeps on CPUs by itself, or differently: look whether engine/sglang/sleep.py may go."""
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
    from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

    release = inspect.getsource(inspect.unwrap(SchedulerWeightUpdaterManager.release_memory_occupation))
    assert "torch.get_device_module().synchronize()" in release
    assert "self.memory_saver_adapter.pause(GPU_MEMORY_TYPE_WEIGHTS)" in release
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
            torch.get_device_module().synchronize()
        assert not TorchMemorySaverAdapter.create(enable=False).enabled
