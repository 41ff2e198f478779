"""From a snapshot to files, and back: everything written is read again and compared before a checkpoint may count.

Shards go through torch's own writer in a thread of this process, one file per rank. Megatron-Core 0.16.1's writer forks a
process per file and waits for it without bound; a Ray actor runs threads that do not survive a fork, and a child that the
kernel kills for its memory would be waited for forever. The files are the same (`torch_dist`), so Megatron's reader reads them.
One thread writes them: torch's writer loses the errors of all threads but the first.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from ctpo_megatron.checkpoints.hashes import bytes_hash, file_hash, new_hash, tensor_hash
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.checkpoint.random_state import random_file
from ctpo_megatron.mcore.checkpoint.rank_report import RankReport
from ctpo_megatron.mcore.checkpoint.snapshot import Place, Snapshot


class _Existing(FileSystem):
    """Files in a directory that is there. torch's own would make one in the place of a file system that is away."""

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Raises FileNotFoundError where there is none."""
        os.stat(path)


def _writer(work: Path) -> FileSystemWriter:
    # per_thread_copy_ahead: the shards are in host memory already
    writer = FileSystemWriter(work, thread_count=1, per_thread_copy_ahead=0)
    writer.fs = _Existing()
    return writer


def write_and_verify(snapshot: Snapshot, work: Path, group: dist.ProcessGroup) -> RankReport:
    """Write this rank's part into `work` and compare it with the snapshot; every rank of `group` calls it.

    Raises CheckpointError when the disk holds something else than the rank, and what torch and the system raise.
    """
    rank = dist.get_rank(group)
    held = {place: tensor_hash(tensor) for place, tensor in snapshot.tensors.items()}
    held |= {place: bytes_hash(content) for place, content in snapshot.objects.items()}
    metadata = torch_checkpoint.save(
        snapshot.shards,
        storage_writer=_writer(work),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )
    report = RankReport()
    if rank == 0:
        save_config(CheckpointingConfig("torch_dist", 1), str(work))
        write_small_file(work, COMMON_STATE_FNAME, snapshot.common, report)
    if snapshot.random is not None:
        write_small_file(work, random_file(rank), snapshot.random, report)
    for name, stored in _of_rank(metadata, rank).items():
        _read_back(work, name, stored, snapshot, held, report)
    if held:
        lost, _ = next(iter(held))
        raise CheckpointError(f"{lost}: {len(held)} shards of rank {rank} are in no file")
    return report


def write_small_file(work: Path, name: str, content: bytes, report: RankReport) -> None:
    """Write a small file and read it back at once."""
    file = work / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    digest = file_hash(file)
    if digest != bytes_hash(content):
        raise CheckpointError(f"{file}: the disk does not hold what was written")
    report.files[name] = {"size": len(content), "digest": digest}


def _of_rank(metadata: Any, rank: int) -> dict[str, list[tuple[int, int, Place]]]:
    """Returns begin and length of the shards in each file that this rank wrote, in their order."""
    files: dict[str, list[tuple[int, int, Place]]] = {}
    for index, info in metadata.storage_data.items():
        if info.relative_path.startswith(f"__{rank}_"):
            offset = None if index.offset is None else tuple(index.offset)
            files.setdefault(info.relative_path, []).append((info.offset, info.length, (index.fqn, offset)))
    return {name: sorted(stored, key=lambda each: each[0]) for name, stored in files.items()}


def _read_back(
    work: Path,
    name: str,
    stored: list[tuple[int, int, Place]],
    snapshot: Snapshot,
    held: dict[Place, str],
    report: RankReport,
) -> None:
    """Read a file once: hash it, and compare each shard in it with what this rank held. Takes what it found out of `held`."""
    file, digest, size = work / name, new_hash(), 0
    report.shards[name] = []
    with file.open("rb") as stream:
        for begin, length, place in stored:
            content = _read(stream, begin - size, file) + _read(stream, length, file)
            digest.update(content)
            key, offset = place
            shard = _loaded(content[begin - size :], offset is None, file, key)
            size = begin + length
            found = bytes_hash(shard) if isinstance(shard, bytes) else tensor_hash(shard)
            if found != held.pop(place, None) or not _same_kind(shard, snapshot.tensors.get(place)):
                raise CheckpointError(f"{file}: {key} at {offset} is not what the rank held")
            shape, dtype = (None, "bytes") if isinstance(shard, bytes) else (list(shard.shape), str(shard.dtype)[6:])
            report.shards[name].append([key, offset, shape, dtype, found, begin, size])
        if rest := stream.read(1):
            raise CheckpointError(f"{file}: {len(rest)} bytes and more follow the last shard")
    report.files[name] = {"size": size, "digest": digest.hexdigest()}


def _read(stream: BinaryIO, length: int, file: Path) -> bytes:
    content = stream.read(length)
    if len(content) != length:
        raise CheckpointError(f"{file}: it ends {length - len(content)} bytes too early")
    return content


def _loaded(content: bytes, is_object: bool, file: Path, key: str) -> Tensor | bytes:
    if is_object:
        return content
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken archives
        raise CheckpointError(f"{file}: {key} cannot be read back: {error}") from error


def _same_kind(shard: Tensor | bytes, held: Tensor | None) -> bool:
    return held is None or (isinstance(shard, Tensor) and shard.shape == held.shape and shard.dtype == held.dtype)
