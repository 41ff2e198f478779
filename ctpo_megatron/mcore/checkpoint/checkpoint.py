"""Checkpoints: weights, optimizer, schedule and random states, in Megatron's distributed format, verified or not at all.

Every rank writes and reads its part. The format describes whole tensors, so a run may go on at another layout. A save is

    snapshot   in the caller's thread: this rank's shards are copied to host memory; training may go on
    write      under a temporary name, in a thread: shards, read back and compared with the snapshot
    commit     on rank 0: compared with the predecessor, the manifest written, renamed

and a checkpoint whose save did not reach the end does not count. The files are described in `files`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from ctpo_megatron.checkpoints.files import MODEL, VERSION, read_manifest, work_directory
from ctpo_megatron.checkpoints.metadata import read_metadata
from ctpo_megatron.checkpoints.verify import verify_files
from ctpo_megatron.errors import (
    CheckpointError,
    CheckpointUnwritten,
    DamagedCheckpoint,
    mendable,
    out_of_space,
    reason,
    storage_words,
)
from ctpo_megatron.mcore.checkpoint import random_state
from ctpo_megatron.mcore.checkpoint.background import BackgroundSave
from ctpo_megatron.mcore.checkpoint.commit import commit
from ctpo_megatron.mcore.checkpoint.optimizer_state import load_optimizer
from ctpo_megatron.mcore.checkpoint.rank_report import RankReport
from ctpo_megatron.mcore.checkpoint.snapshot import Snapshot, sharded_state, take_snapshot
from ctpo_megatron.mcore.checkpoint.trainables import check_value_head, check_words, take_state
from ctpo_megatron.mcore.checkpoint.writer import write_and_verify
from ctpo_megatron.mcore.collective import first_complaint, on_first_rank
from ctpo_megatron.mcore.hf.export import copy_companions
from ctpo_megatron.mcore.hf.load import unwrap
from ctpo_megatron.parallel.plain import gather_plain


@dataclass(frozen=True)
class Trained:
    """Holds what of a rank goes into a checkpoint. Without optimizer and schedule it is one of weights only."""

    models: list[torch.nn.Module]
    optimizer: MegatronOptimizer | None
    schedule: OptimizerParamScheduler | None
    model_path: str  # whose config.json and tokenizer are copied into it
    words: dict[str, Any] | None = None  # of adapters (`trainables.adapter_words`) or a value head

    def header(self) -> dict[str, Any]:
        """Returns the manifest's beginning."""
        dtype = next(unwrap(self.models[0]).parameters()).dtype
        return {
            "version": VERSION,
            "world_size": dist.get_world_size(),
            "dtype": str(dtype).removeprefix("torch."),
            "scheduler_steps": None if self.schedule is None else self.schedule.num_steps,
            **(self.words or {}),
        }


def save_checkpoint(directory: str | Path, trained: Trained, saver: BackgroundSave, *, moved: bool = False) -> None:
    """Begin to save; every rank calls it, and `saver.settle` afterwards. What is saved is the state at this call.

    The checkpoint was begun by `begin_checkpoint`, and what lies in its directory becomes a part. `moved`: weights must differ
    from those of the checkpoint before. Raises CheckpointError on every rank when the save cannot begin; `settle` raises it when
    it cannot be finished. What stood at `directory` before stands until the new one is verified.
    """
    target = Path(directory)
    header = trained.header()
    work = work_directory(target)

    def begin() -> None:
        if not work.is_dir():
            raise CheckpointUnwritten(f"{work} is not there; call begin_checkpoint first, on a file system that rank 0 sees")
        (work / MODEL).mkdir()
        copy_companions(Path(trained.model_path), work / MODEL, header["dtype"])

    on_first_rank(begin, f"checkpoint {target} cannot be begun")
    with _told(f"checkpoint {target} cannot be taken from the model"):
        snapshot = take_snapshot(trained.models, trained.optimizer)
    saver.start(lambda group: _finish(snapshot, work, target, header, group, moved))


def load_checkpoint(directory: str | Path, trained: Trained) -> None:
    """Take weights, optimizer, schedule and random states from a checkpoint.

    Every rank calls it. The ranks first compare all files with their hashes, each a share. The places of optimizer and schedule
    are restored, their settings are the present ones. Random states are restored where the number of ranks is the same; otherwise
    they stay as the seed made them. Raises DamagedCheckpoint for one that is not as it was written, CheckpointError for one that
    is missing, unfinished, or of another model or number format.
    """
    source = Path(directory)
    manifest = _verified_together(source)
    check_words(source, manifest, trained.words)
    if trained.optimizer is not None:
        check_value_head(source, manifest, trained.words)
    if trained.optimizer is not None and manifest["dtype"] != (dtype := trained.header()["dtype"]):
        raise CheckpointError(
            f"{source}: its weights are {manifest['dtype']}, the trainer's {dtype}, and torch would convert them silently; set "
            f"model.dtype={manifest['dtype']}"
        )
    with _told(f"checkpoint {source} cannot be read into this model"):
        sharded = sharded_state(trained.models, trained.optimizer, loading=True)
        # weights alone may be taken from a checkpoint that holds more
        strict = "raise_unexpected" if trained.optimizer is None else "raise_all"
        loaded = dist_checkpointing.load(sharded, str(source), strict=strict)
        for number, model in enumerate(trained.models):
            take_state(model, loaded[f"model{number}"])
        if trained.optimizer is not None:
            load_optimizer(trained.optimizer, loaded["optimizer"])
    dist.barrier()
    if trained.schedule is not None:
        trained.schedule.num_steps = 0
        trained.schedule.step(manifest["scheduler_steps"])
        if manifest["world_size"] == dist.get_world_size():
            random_state.restore(source, dist.get_rank())


def _finish(snapshot: Snapshot, work: Path, target: Path, header: dict[str, Any], group: dist.ProcessGroup, moved: bool) -> None:
    """Do the part of a save that runs beside training."""
    report, complaint, may_pass = None, None, False
    with _told(f"checkpoint {target} cannot be written", work):
        try:
            report = write_and_verify(snapshot, work, group)
        except CheckpointException:
            raise
        except Exception as error:  # noqa: BLE001 - this rank's alone; the others are told below
            complaint = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            if out_of_space(error, work):
                complaint += f"; {storage_words(error, work)}"
            may_pass = mendable(error, work)
        reports = gather_plain((report, complaint, may_pass), tuple[RankReport | None, str | None, bool], group)

    def finish() -> None:
        complaints = [f"rank {rank}: {each}" for rank, (_, each, _) in enumerate(reports) if each]
        if complaints:
            raise (CheckpointUnwritten if any(passing for *_, passing in reports) else CheckpointError)("; ".join(complaints))
        commit(work, target, header, [report for report, *_ in reports if report], snapshot.weights, moved=moved)

    on_first_rank(finish, f"checkpoint {target} does not count", group)


def _verified_together(source: Path) -> dict[str, Any]:
    """Returns the manifest, after the ranks have compared all files; what one of them finds, all raise."""
    manifest, damage, other = {}, None, None
    try:
        manifest = read_manifest(source)
        names = sorted(manifest["files"], key=lambda name: manifest["files"][name]["size"], reverse=True)
        verify_files(source, manifest, names[dist.get_rank() :: dist.get_world_size()])
        read_metadata(source)  # before torch unpickles it
    except DamagedCheckpoint as error:
        damage = str(error)
    except (CheckpointError, OSError) as error:
        other = str(error)
    if complaint := first_complaint(damage):
        raise DamagedCheckpoint(complaint)
    if complaint := first_complaint(other):
        raise CheckpointError(complaint)
    return manifest


@contextlib.contextmanager
def _told(failure: str, written: Path | None = None) -> Iterator[None]:
    """Inside it, what torch, megatron and the system raise becomes a CheckpointError that begins with `failure`; where the
    storage that is written to is at fault, a CheckpointUnwritten.

    `written`: the directory that is being written, if one is. torch's writer reports a full disk as an unexpected position in a
    file, so the file system is asked.
    """
    try:
        yield
    except CheckpointException as error:  # torch's, which tells every rank about all of them
        reasons = "; ".join(f"rank {rank}: {reason(cause[0], written)}" for rank, cause in sorted(error.failures.items()))
        passing = any(_passing(cause[0], written) for cause in error.failures.values())
        raise (CheckpointUnwritten if passing else CheckpointError)(f"{failure}: {reasons}") from error
    except (CheckpointingException, OSError, RuntimeError, KeyError, ValueError, AssertionError, UnpicklingError) as error:
        kind = CheckpointUnwritten if _passing(error, written) else CheckpointError
        raise kind(f"{failure}: {reason(error, written)}") from error


def _passing(error: BaseException, written: Path | None) -> bool:
    return written is not None and mendable(error, written)
