"""Ranks that are given back the parts of a copy go on as if nothing had happened, to the last bit. Real megatron-core on gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from ctpo_megatron.checkpoints.hashes import bytes_hash
from ctpo_megatron.errors import CopyLost
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.dist.test_checkpoint import STEPS, assert_equal, draws, engine_for, train, weights
from tests.support.families import MODELS
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import write_model

pytestmark = pytest.mark.dist

PIECE = 10_007  # bytes: shards end in the middle of pieces, and some span many
CASES: list[tuple[str, str, dict[str, int]]] = [
    ("qwen3", "float32", {"dp": 2}),
    ("qwen3", "bfloat16", {"tp": 2}),  # the optimizer keeps the weights in float32
    ("qwen3", "float32", {"pp": 2, "vpp": 2}),  # tied embeddings: the last stage holds a copy
    ("deepseek_v3", "float32", {"dp": 2, "ep": 2}),
]
EXPECTED = {
    "flipped byte": "in the part of rank 1 is not what was handed over",
    "lost part": "rank 1 is gone",
    "other contents": "are not those that the rank handed over",
    "other layout": "it was made at the layout",
    "missing shard": "is in no part of it",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("qwen3", "deepseek_v3")
    return {family: write_model(tmp_path_factory.mktemp(family), family, 4, MODELS[family]) for family in families}


def test_a_recalled_trainer_equals_one_that_went_on(models: dict[str, Path], tmp_path: Path) -> None:
    ports = [free_port() for _ in range(2 * len(CASES))]
    for found in run_ranks(2, hand_over_and_recall, models, tmp_path, ports):
        for (family, dtype, layout), (went_on, recalled) in zip(CASES, found, strict=True):
            where = f"{family} {dtype} {layout}"
            assert_equal(recalled["first"], went_on["first"], where)
            assert recalled["draws"] == went_on["draws"], where
            assert recalled["steps"] == went_on["steps"], where
            assert_equal(recalled["last"], went_on["last"], where)


def test_a_copy_that_is_wrong_changes_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """What one rank does not get as it was, all refuse; and a good copy can still be taken afterwards."""
    for found in run_ranks(2, misuse, models["qwen3"], tmp_path, [free_port(), free_port(), free_port()]):
        for fault, words in found["told"].items():
            assert EXPECTED[fault] in words, (fault, words)
        assert found["told"].keys() == EXPECTED.keys()
        assert_equal(found["after"], found["before"], "after the faults")
        assert found["after good"] == found["good"]
        assert found["collects"], "megatron collects no garbage any more: ranks need not freeze theirs (trainer/actor.py)"


# ---- what runs in the ranks; the parts lie in files, where all ranks read them


class Kept:
    """A copy in a directory: of each rank its row and its contents."""

    def __init__(self, root: Path, rank: int) -> None:
        self.root, self.rank = root, rank
        root.mkdir(parents=True, exist_ok=True)

    def take(self, engine: TrainerRank) -> None:
        import torch.distributed as dist

        part = engine.part()
        train(engine, 1)  # what is handed over is what was copied
        row = np.zeros(part.size, dtype=np.uint8)
        for begin, piece in part.pieces(PIECE):
            assert 0 < len(piece) <= PIECE
            row[begin : begin + len(piece)] = piece
        packed = part.contents().packed()
        row.tofile(self.root / f"row_{self.rank}")
        (self.root / f"contents_{self.rank}").write_bytes(packed)
        self.digest = bytes_hash(packed)
        dist.barrier()

    def contents(self) -> Any:
        from ctpo_megatron.mcore.checkpoint.part import Contents

        return Contents.parse((self.root / f"contents_{self.rank}").read_bytes(), self.digest)

    def read(self, rank: int, begin: int, end: int) -> np.ndarray:
        file = self.root / f"row_{rank}"
        if not file.exists():
            raise CopyLost(f"what held the part of rank {rank} is gone")
        return np.fromfile(file, dtype=np.uint8, count=end - begin, offset=begin)

    def back(self, engine: TrainerRank) -> None:
        engine.recall(self.contents, self.read)


def hand_over_and_recall(
    rank: RankInfo, models: dict[str, Path], root: Path, ports: list[int]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    ports, results = list(ports), []
    for number, (family, dtype, layout) in enumerate(CASES):
        kept = Kept(root / str(number), rank.rank)
        engine = engine_for(replace(rank, master_port=ports.pop()), models[family], layout, dtype)
        train(engine, 2)
        kept.take(engine)
        went_on = gone_on(engine)
        engine.close()
        engine = engine_for(replace(rank, master_port=ports.pop()), models[family], layout, dtype)
        kept.back(engine)
        train(engine, 1)
        results.append((went_on, gone_on(engine)))
        engine.close()
    return results


def gone_on(engine: TrainerRank) -> dict[str, Any]:
    first = weights(engine)
    return {"first": first, "draws": draws(), "steps": train(engine, STEPS), "last": weights(engine)}


def misuse(rank: RankInfo, path: Path, root: Path, ports: list[int]) -> dict[str, Any]:
    import torch.distributed as dist

    kept = Kept(root / "kept", rank.rank)
    engine = engine_for(replace(rank, master_port=ports[0]), path, {"dp": 2})
    train(engine, 2)
    kept.take(engine)
    good = train(engine, 1)
    with patch("gc.collect") as collect:
        engine.part()
    engine.close()
    engine = engine_for(replace(rank, master_port=ports[1]), path, {"dp": 2})
    train(engine, 1)
    found: dict[str, Any] = {"told": {}, "before": weights(engine), "good": good, "collects": collect.called}

    def refused(fault: str, contents: Any = kept.contents, read: Any = kept.read, by: TrainerRank = engine) -> None:
        with pytest.raises(CopyLost) as caught:
            by.recall(contents, read)
        found["told"][fault] = str(caught.value)
        dist.barrier()

    def without_one() -> Any:
        contents = kept.contents()
        return replace(contents, shards=[each for each in contents.shards if "word_embeddings" not in each.name])

    row = root / "kept" / "row_1"
    refused("missing shard", contents=without_one)
    if rank.rank == 0:
        flipped = np.fromfile(row, dtype=np.uint8)
        flipped[len(flipped) // 2] ^= 1
        row.rename(row.with_name("good"))
        flipped.tofile(row)
    dist.barrier()
    refused("flipped byte")
    if rank.rank == 0:
        row.unlink()
    dist.barrier()
    refused("lost part")
    if rank.rank == 0:
        row.with_name("good").rename(row)
    dist.barrier()
    digest, kept.digest = kept.digest, kept.digest if rank.rank else "another"
    refused("other contents")
    kept.digest = digest
    found["after"] = weights(engine)
    kept.back(engine)
    train(engine, 1)
    found["after good"] = train(engine, 1)
    engine.close()
    other = engine_for(replace(rank, master_port=ports[2]), path, {"tp": 2})
    refused("other layout", by=other)
    other.close()
    return found
