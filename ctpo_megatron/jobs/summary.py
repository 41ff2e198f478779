"""summary.json of `ctpo train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctpo_megatron.config import RunConfig
from ctpo_megatron.loop.evaluation.files import read_estimates
from ctpo_megatron.loop.train import TrainLoop
from ctpo_megatron.record import write_summary
from ctpo_megatron.record.incarnation import IncarnationLog


def summary_of(config: RunConfig, loop: TrainLoop, wall: float) -> dict[str, Any]:
    """Returns what `loop` came to, in a command that took `wall` seconds."""
    measured = [accuracy for _, accuracy in sorted(loop.accuracies.items())]
    return {
        "accuracy_before": measured[0] if measured else None,
        "accuracy_after": measured[-1] if measured else None,
        "steps": config.train.steps,
        "seed": config.seed,
        **loop.totals.summary(),
        "wall_s": wall,
        "weight_version": config.train.steps,
        "ledger": loop.ledger.summary(),
    }


async def write_whole_summary(run_dir: Path, summary: dict[str, Any], events: IncarnationLog) -> None:
    """Write `summary`, with the evaluations and the goodput of all incarnations. Raises StorageError."""
    more = {"evaluations": read_estimates(run_dir), "goodput": events.goodput(done=True).summary()}
    write_summary(run_dir, summary | more)
