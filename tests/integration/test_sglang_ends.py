"""How real SGLang servers end: in order, in the middle of an update, with their parent, before they have begun."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.processes import group_members, group_shared_memory
from ctpo_megatron.errors import EngineError, StartLost, WeightSyncError
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.ports import listen
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.types import TrainSample
from tests.support.engines import HOST, checkpoint_tensors, endless, in_flight, load_reference, session, start_server
from tests.support.patience import eventually
from tests.support.publishing import AGREEMENT, PROMPT, check_against, perturbed, publishing, sample, serving
from tests.support.ranks import run_ranks
from tests.support.routing import check_crossing, check_record, drift, train_samples
from tests.support.routing import sample as record

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_bad_model_is_explained(tmp_path: Path) -> None:
    """A server that cannot start says why, at once, and leaves nothing."""
    with pytest.raises(EngineError, match=r"exit code") as raised:
        start_server(tmp_path / "missing", tmp_path / "server.log")
    assert str(tmp_path / "server.log") in str(raised.value)
    assert "missing" in str(raised.value)


@pytest.mark.long
def test_moe_on_two_ranks_and_end(tmp_path: Path) -> None:
    """Qwen3-MoE, tensor parallel, from disk and by broadcast, with a record of its routing and of the likeliest tokens.

    `stop` leaves no process, no zombie and no shared memory.
    """
    directory = endless(make_toy_model(tmp_path / "moe", "qwen3_moe", seed=1, init_std=0.2))
    running = start_server(directory, tmp_path / "server.log", tp=2, routing=read_hf_config(directory).routing, top_k=20)
    children = [psutil.Process(running.server.pid), *psutil.Process(running.server.pid).children(recursive=True)]
    assert len(children) > 2

    samples: list[TrainSample] = []

    async def scenario() -> None:
        new = perturbed(directory, seed=2)
        async with publishing(running, new) as (client, publisher):
            check_against(load_reference(directory), await sample(client, 0.7), 0.7)
            await check_record(client, load_reference(directory), PROMPT)
            samples.extend(await train_samples(client, PROMPT, 8))
            crossing = [asyncio.create_task(record(client, PROMPT, tokens=1000, session=session)) for session in range(3)]
            await in_flight(running.url, running.api_key, running=3)
            await publisher.publish(1)
            check_against(new, await sample(client, 0.7), 0.7)
            await check_record(client, new, PROMPT)
            check_crossing(new, PROMPT, await asyncio.gather(*crossing))

    try:
        asyncio.run(scenario())
        mapped = group_shared_memory(running.server.pid)
        assert mapped, "nothing to clean up: the check below would be void"
    finally:
        running.server.stop()
    (close,), (coarse,) = run_ranks(1, drift, directory, samples, "float32"), run_ranks(1, drift, directory, samples, "bfloat16")
    assert close["max with"] < AGREEMENT
    assert coarse["mean with"] < coarse["mean without"], coarse  # its routers round, and choose otherwise
    assert coarse["max with"] < coarse["max without"], coarse
    assert not any(child.is_running() for child in children)
    assert [path for path in mapped if Path(path).exists()] == []


def test_server_dies_during_update(qwen3: Path, forks: Path, tmp_path: Path) -> None:
    """The sender waits for nobody who is gone, and can still be closed."""
    running = start_server(qwen3, tmp_path / "server.log", forks=forks)
    try:
        named = checkpoint_tensors(load_reference(qwen3))
        sender = running.sender()
        session(running, "begin")

        def buckets() -> Iterator[list[tuple[str, torch.Tensor]]]:
            yield named[:2]
            running.server.stop()
            yield named[2:]

        begin = time.monotonic()
        with pytest.raises(WeightSyncError, match=running.url):
            sender.send(buckets(), 1)
        sender.close()
        assert time.monotonic() - begin < 20
    finally:
        running.server.stop()


def test_dies_with_its_parent(qwen3: Path, tmp_path: Path) -> None:
    """SIGKILL to the process that started it, while it starts."""
    program = (
        "import sys; from pathlib import Path; from tests.support.engines import start_server\n"
        "running = start_server(Path(sys.argv[1]), Path(sys.argv[2]), wait=False); print(running.server.pid, flush=True)\n"
        "import time; time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(qwen3), str(tmp_path / "server.log")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    group = int(parent.stdout.readline())
    time.sleep(3)
    assert group_members(group)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert eventually(lambda: not group_members(group), within_s=10)


@pytest.mark.long
def test_a_port_that_was_taken_meanwhile_ends_the_start(qwen3: Path, tmp_path: Path) -> None:
    """As one that may be tried again. SGLang itself says that it is ready, and stays."""
    with listen(HOST) as other:
        running = start_server(qwen3, tmp_path / "server.log", port=other.getsockname()[1], wait=False)
        try:
            with pytest.raises(StartLost, match="ended with exit code 98"):
                running.server.wait_healthy(60)
            assert group_members(running.server.pid) == []
        finally:
            running.server.stop()


def test_unreachable_server_is_an_error() -> None:
    """A closed port: tried again a few times, then an error that names it."""

    async def scenario() -> None:
        async with EngineClient(serving(f"http://{HOST}:9"), "key", request_timeout_s=5) as client:
            with pytest.raises(EngineError, match=rf"http://{HOST}:9/generate"):
                await sample(client, 1.0)

    asyncio.run(scenario())
