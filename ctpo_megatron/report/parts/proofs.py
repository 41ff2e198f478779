"""Which weights were proven on the servers, and which checkpoints on the disk."""

from __future__ import annotations

from typing import Any

from ctpo_megatron.record.events import CheckpointDamaged, CheckpointLost, CheckpointVerified, WeightsPublished
from ctpo_megatron.report.figures.curves import curves
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.reading.happenings import sentence
from ctpo_megatron.report.reading.run import Run


def proofs(run: Run, prefix: str) -> Part:
    """Returns what of a run was proven, and what was not."""
    published, verified = run.happened(WeightsPublished.name), run.happened(CheckpointVerified.name)
    bad = [*run.happened(CheckpointLost.name), *run.happened(CheckpointDamaged.name)]
    metrics = run.metrics
    gaps = [value for _, value in metrics.series("publish/canary_gap_max")]
    numbers: dict[str, Any] = {
        "publications": len(published),
        "last_version": published[-1].fields.get("version") if published else None,
        "servers": published[-1].fields.get("servers") if published else None,
        "canary_gap_max": max(gaps, default=None),
        "attested": sum(1 for _ in metrics.series("publish/attest")),
        "verified": len(verified),
        "last_verified": verified[-1].fields.get("step") if verified else None,
        "unproven_steps": _unproven(run, verified[-1].fields.get("step") if verified else 0),
        "there": list(run.checkpoints),
        "trouble": [{"time": each.time, "sentence": sentence(each)} for each in bad],
    }
    figures = [
        curves(
            "publication",
            "Publication of the weights",
            "seconds",
            {name: metrics.series(f"publish/{name}") for name in ("total", "paused", "transfer", "attest", "canary")},
            note="`paused`: how long the servers stood still for it.",
            zero=True,
        ),
        curves(
            "canary",
            "The canary's largest gap",
            "nats",
            {"gap": metrics.series("publish/canary_gap_max")},
            note="Trainer and servers compute the same prompt after a publication; this is the largest distance of a log-prob.",
        ),
    ]
    return part("proofs", "Weights and checkpoints proven", prefix=prefix, figures=figures, numbers=numbers)


def _unproven(run: Run, last: Any) -> int:
    """Returns how many steps lie behind the last verified checkpoint: what a death now would cost."""
    return max(0, run.metrics.last_step - (last if isinstance(last, int) else 0))
