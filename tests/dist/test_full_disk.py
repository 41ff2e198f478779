"""A disk that fills up while a checkpoint or a model is written: all ranks are told so, and what was verified stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.checkpoints.verify import verify_checkpoint
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.rank import RankInfo
from tests.dist.test_checkpoint import engine_for, train
from tests.support.checkpoints import begin_together, newest_name
from tests.support.disks import fill, small_disk
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

pytestmark = pytest.mark.dist

KB = 1 << 10
LEFT = (200 * KB, 4 * KB)  # room for a part of the shards, and for next to nothing


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    model = write_model(tmp_path / "qwen3", "qwen3")
    with small_disk(tmp_path / "disk", 64 * KB) as disk:
        for told in run_ranks(1, fills_up, model, disk):
            for message in told:
                assert f"{disk}" in message
                assert "no space left on the file system" in message
        assert newest_name(disk) == "step_00000001"
        verify_checkpoint(disk / "step_00000001")
        assert not (disk / "model").exists()


# ---- what runs in the ranks


def fills_up(rank: RankInfo, model: Path, disk: Path) -> list[str]:
    engine = engine_for(rank, model, {})
    train(engine, 1)
    first = disk / "step_00000001"
    begin_together(first)
    engine.save(first, background=False)
    told = []
    for number, room in enumerate(LEFT, start=2):
        train(engine, 1)
        target = disk / f"step_{number:08d}"
        begin_together(target)
        ballast = fill(disk, leave=room)
        with pytest.raises(CheckpointError) as caught:
            engine.save(target, background=False)
        told.append(str(caught.value))
        ballast.unlink()
    fill(disk, leave=LEFT[0])
    with pytest.raises(CheckpointError) as caught:
        engine.save_hf(disk / "model")
    told.append(str(caught.value))
    engine.close()
    return told
