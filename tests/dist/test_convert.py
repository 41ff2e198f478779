"""Hugging Face -> checkpoint -> Hugging Face gives back every byte; a byte that differs is found. Real megatron-core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from torch import Tensor

from ctpo_megatron.checkpoints.verify import verify_checkpoint
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import CheckpointError, DamagedCheckpoint, InputError
from ctpo_megatron.jobs.convert import convert_to_hf
from ctpo_megatron.mcore.rank import RankInfo
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.files import weight_files
from tests.dist.test_checkpoint_faults import flip
from tests.support.families import write_family
from tests.support.ranks import free_port, run_ranks

pytestmark = pytest.mark.dist

LAYOUTS = {  # of writing, of reading
    "qwen3": ({"tp": 2}, {"pp": 2}),
    "qwen3_moe": ({"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}),
    "deepseek_v3": ({"tp": 2, "ep": 2}, {"pp": 2}),
    "glm4_moe": ({"tp": 2, "etp": 2}, {"dp": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_family(tmp_path_factory.mktemp(family), family) for family in LAYOUTS}


def test_round_trip_is_exact_and_a_flipped_byte_is_found(models: dict[str, Path], tmp_path: Path) -> None:
    ports = [free_port() for _ in range(12)]
    for found in run_ranks(2, conversions, models, tmp_path, ports):
        assert "is not what the other side holds" in found["planted in the output"]
        assert "distcp" in found["planted in the checkpoint"]
        for family, model in models.items():
            expected = tensors(model)
            there, back = found[family]
            assert there == back == (len(expected), sum(tensor.nbytes for tensor in expected.values()))
    for family, model in models.items():
        verify_checkpoint(tmp_path / family / "megatron")
        read_hf_config(tmp_path / family / "hf")
        expected, got = tensors(model), tensors(tmp_path / family / "hf")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype
            assert got[name].numpy().tobytes() == tensor.numpy().tobytes(), name

    # the command: what exists is not replaced, and of a damaged checkpoint nothing is written
    checkpoint, out = tmp_path / "qwen3" / "megatron", tmp_path / "out"
    with pytest.raises(InputError, match="exists already"):
        convert_to_hf(checkpoint, tmp_path / "qwen3" / "hf", [])
    with pytest.raises(InputError, match="tpp"):
        convert_to_hf(checkpoint, out, ["parallel.tpp=2"])
    flip(checkpoint / "__0_0.distcp", 0.5)
    with pytest.raises(DamagedCheckpoint, match="tensor "):
        convert_to_hf(checkpoint, out, [])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(directory) for name, tensor in load_file(file).items()}


# ---- what runs in the ranks


def conversions(rank: RankInfo, models: dict[str, Path], root: Path, ports: list[int]) -> dict[str, Any]:
    from ctpo_megatron.mcore.checkpoint import convert

    ports = list(ports)

    def run(function: Callable, source: Path, target: Path, layout: dict[str, int]) -> tuple[int, int]:
        done = function(replace(rank, master_port=ports.pop()), str(source), str(target), ParallelConfig(**layout))
        return done.tensors, done.bytes

    found: dict[str, Any] = {}
    for family, (writing, reading) in LAYOUTS.items():
        there, back = root / family / "megatron", root / family / "hf"
        there_count = run(convert.weights_to_megatron, models[family], there, writing)
        found[family] = (there_count, run(convert.weights_to_hf, there, back, reading))

    def planted(name: str, where: str, error: type[Exception], *arguments: Any, file: Path) -> None:
        original = getattr(convert, where)

        def after_a_flip(*args: Any) -> Any:
            if rank.rank == 0:
                flip(file if file.is_file() else sorted(file.glob("*.safetensors"))[0], 0.5)
            import torch.distributed as dist

            dist.barrier()
            return original(*args)

        with patch.object(convert, where, after_a_flip), pytest.raises(error) as caught:
            run(*arguments)
        found[name] = str(caught.value)

    source, megatron, hf = models["qwen3"], root / "flipped" / "megatron", root / "flipped" / "hf"
    to_megatron = (convert.weights_to_megatron, source, megatron, {"tp": 2})
    to_hf = (convert.weights_to_hf, root / "qwen3" / "megatron", hf, {"tp": 2})
    planted("planted in the checkpoint", "_forget", DamagedCheckpoint, *to_megatron, file=megatron / "__0_0.distcp")
    planted("planted in the output", "_compare", CheckpointError, *to_hf, file=hf)
    return found
