"""What goes wrong with a checkpoint is found and told, and the one before stays in use. Real megatron-core on gloo."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ctpo_megatron.errors import CheckpointError, DamagedCheckpoint
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.dist.test_checkpoint import engine_for, train, weights
from tests.support.checkpoints import begin_together, newest_name
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

pytestmark = pytest.mark.dist

FILES = (
    "__1_0.distcp", ".metadata", "common.pt", "metadata.json", "random/rank_00001.pt", "shards.json", "model/config.json",
    "checkpoint.json", "run.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


def test_faults_leave_the_checkpoint_before_in_use(model: Path, tmp_path: Path) -> None:
    for found in run_ranks(2, mishaps, model, tmp_path):
        assert found["unfinished while training"]
        assert found["saved at the call"]
        for told, words in found["told"].items():
            assert EXPECTED[told] in words, (told, words)
        assert found["told"].keys() == EXPECTED.keys()
        assert set(found["latest after a failure"]) == {"step_00000002"}
        assert found["latest"] == "step_00000004"
        for name, (flipped, cut, missing) in found["damaged"].items():
            assert all(name in message for message in (flipped, cut, missing)), name
        assert "tensor " in found["damaged"]["__1_0.distcp"][0]
        assert found["damaged"].keys() == set(FILES)
    assert not (tmp_path / GONE).exists(), "something was made in its place"


def test_a_rank_that_dies_leaves_the_checkpoint_before_in_use(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(2, death, model, tmp_path)
    assert "step_00000002 cannot be written" in (tmp_path / "told").read_text()
    assert newest_name(tmp_path) == "step_00000001"


GONE = "gone.tmp"
EXPECTED = {
    "stale": "stale: its weights are those of step_00000002",
    "no space for shards": "rank 1: ",
    "no space for the rest": "rank 1: OSError: [Errno 28]",
    "the disk lies": "rank 1: ",
    "the directory is gone": "gone.tmp: no such file or directory",
}

# ---- what runs in the ranks


def mishaps(rank: RankInfo, path: Path, root: Path) -> dict[str, Any]:
    engine = engine_for(rank, path, {"dp": 2})
    from ctpo_megatron.mcore.checkpoint import checkpoint as module

    train(engine, 1)
    save(engine, step(root, 1))
    train(engine, 1)
    found: dict[str, Any] = {"told": {}, "latest after a failure": []}
    snapshots = []

    def kept(*args: Any) -> Any:
        snapshots.append(take(*args))
        return snapshots[-1]

    take = module.take_snapshot
    with patch.object(module, "take_snapshot", kept), slow_writer(module):
        moment = weights(engine)
        save(engine, step(root, 2), background=True)
        train(engine, 2)
        found["unfinished while training"] = not step(root, 2).exists()
        engine.settle(120)
    train(engine, 1)

    def refused(name: str, fault: Any) -> None:
        with fault, pytest.raises(CheckpointError) as caught:
            save(engine, step(root, 3))
        found["told"][name] = str(caught.value)
        found["latest after a failure"].append(newest_name(root))
        train(engine, 1)

    refused("stale", patch.object(module, "take_snapshot", lambda *_: snapshots[0]))
    for name, fault in write_faults(rank, root).items():
        refused(name, fault)
    save(engine, step(root, 4))
    found["latest"] = newest_name(root)
    found["damaged"] = {name: damages(engine, rank, step(root, 4), name) for name in FILES}
    for number in (4, 2):
        engine.load(step(root, number))
        assert (step(root, number) / "run.json").read_text() == f"step_{number:08d}"
    now = weights(engine)
    found["saved at the call"] = all((now[name] == value).all() for name, value in moment.items())
    engine.close()
    return found


def write_faults(rank: RankInfo, root: Path) -> dict[str, Any]:
    """On rank 1 only."""
    from ctpo_megatron.mcore.checkpoint import writer

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flipped(*args: Any, **options: Any) -> Any:
        metadata = written(*args, **options)
        flip(step(root, 3).with_name("step_00000003.tmp") / "__1_0.distcp", 0.5)
        return metadata

    written, made = writer.torch_checkpoint.save, writer._writer
    if rank.rank == 0:
        return {name: nullcontext() for name in EXPECTED if name != "stale"}
    return {
        "no space for shards": patch.object(writer.torch_checkpoint.FileSystemWriter, "write_data", full),
        "no space for the rest": patch.object(writer, "write_small_file", full),
        "the disk lies": patch.object(writer.torch_checkpoint, "save", flipped),
        "the directory is gone": patch.object(writer, "_writer", lambda work: made(work.with_name(GONE))),
    }


@contextmanager
def slow_writer(module: Any) -> Iterator[None]:
    write = module.write_and_verify

    def later(*args: Any) -> Any:
        time.sleep(8)
        return write(*args)

    with patch.object(module, "write_and_verify", later):
        yield


def damages(engine: TrainerRank, rank: RankInfo, checkpoint: Path, name: str) -> list[str]:
    """What a load says when a bit of the file is flipped, when it is cut short, and when it is gone."""
    file = checkpoint / name
    whole, told = file.read_bytes(), []
    for damage in (lambda: flip(file, 0.5), lambda: file.write_bytes(whole[:-9]), file.unlink):
        together(rank, damage)
        with pytest.raises(DamagedCheckpoint) as caught:
            engine.load(checkpoint)
        told.append(str(caught.value))
        together(rank, lambda: file.write_bytes(whole))
    return told


def together(rank: RankInfo, action: Callable[[], Any]) -> None:
    torch.distributed.barrier()
    if rank.rank == 0:
        action()
    torch.distributed.barrier()


def flip(file: Path, place: float) -> None:
    """One bit, at a fraction of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 4
    file.write_bytes(content)


def save(engine: TrainerRank, target: Path, *, background: bool = False) -> None:
    begin_together(target, target.name)
    engine.save(target, background=background)


def step(root: Path, number: int) -> Path:
    return root / f"step_{number:08d}"


def death(rank: RankInfo, path: Path, root: Path) -> None:
    engine = engine_for(rank, path, {"dp": 2})
    from ctpo_megatron.mcore.checkpoint import writer

    save(engine, step(root, 1))
    train(engine, 1)
    if rank.rank == 1:
        writer.write_small_file = lambda *_: os.kill(
            os.getpid(), signal.SIGKILL
        )  # the shards are written, the random states are not
    try:
        save(engine, step(root, 2))
    except CheckpointError as error:
        (root / "told").write_text(str(error))
