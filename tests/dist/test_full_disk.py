"""A disk that fills up or goes away while a checkpoint or a model is written: all ranks are told so, what was verified stays, and
the same save succeeds when it is mended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from ctpo_megatron.checkpoints.files import verified_checkpoints, work_directory
from ctpo_megatron.checkpoints.verify import verify_checkpoint
from ctpo_megatron.errors import CheckpointUnwritten
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.dist.test_checkpoint import engine_for, train
from tests.support.checkpoints import begin_together
from tests.support.disks import fill, small_disk
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

pytestmark = pytest.mark.dist

KB = 1 << 10
LEFT = (200 * KB, 4 * KB)  # room for a part of the shards, and for next to nothing


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path: Path, ranks: int) -> None:
    model = write_model(tmp_path / "qwen3", "qwen3")
    with small_disk(tmp_path / "disk", 64 * KB) as disk:
        for told in run_ranks(ranks, fills_up, model, disk, ranks):
            for message in told:
                assert f"{disk}" in message
                assert "no space left on the file system" in message
        assert [path.name for path in verified_checkpoints(disk)] == ["step_00000001", "step_00000004"]
        for path in verified_checkpoints(disk):
            verify_checkpoint(path)
        assert not (disk / "model").exists()


# ---- what runs in the ranks


def fills_up(rank: RankInfo, model: Path, disk: Path, ranks: int) -> list[str]:
    engine = engine_for(rank, model, {"dp": ranks})
    train(engine, 1)
    first = disk / "step_00000001"
    begin_together(first)
    engine.save(first, background=False)
    told = []
    for number, room in enumerate(LEFT, start=2):
        train(engine, 1)
        target = disk / f"step_{number:08d}"
        begin_together(target)
        ballast = on_first(disk, room)
        with pytest.raises(CheckpointUnwritten) as caught:
            engine.save(target, background=False)
        told.append(str(caught.value))
        dist.barrier()
        if ballast is not None:
            ballast.unlink()
    train(engine, 1)
    goes_away_and_comes_back(engine, disk / "step_00000004")
    on_first(disk, LEFT[0])
    with pytest.raises(CheckpointUnwritten) as caught:
        engine.save_hf(disk / "model")
    told.append(str(caught.value))
    engine.close()
    return told


def on_first(disk: Path, room: int) -> Path | None:
    """Fill the disk on rank 0, which returns what fills it, while the others wait."""
    ballast = fill(disk, leave=room) if dist.get_rank() == 0 else None
    dist.barrier()
    return ballast


def goes_away_and_comes_back(engine: TrainerRank, target: Path) -> None:
    """What was begun is moved away before the ranks write; then the same checkpoint is saved."""
    begin_together(target)
    if dist.get_rank() == 0:
        work_directory(target).rename(target.with_name("away"))
    dist.barrier()
    with pytest.raises(CheckpointUnwritten):
        engine.save(target, background=False)
    begin_together(target)
    engine.save(target, background=True)
    engine.settle()
