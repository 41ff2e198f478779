"""What became of the groups of a run, by length and by difficulty."""

from __future__ import annotations

from ctpo_megatron.report.figures.bars import shares
from ctpo_megatron.report.figures.curves import curves
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.reading.run import Run
from ctpo_megatron.types import End


def ledger(run: Run, prefix: str) -> Part:
    """Returns the ledger of a run."""
    numbers = run.groups.tally.summary() if run.groups.tally.groups else {}
    figures = [
        shares("by_length", "Groups by mean length", "tokens, up to", numbers.get("by_length", {})),
        shares("by_difficulty", "Groups by mean reward", "mean reward", numbers.get("by_difficulty", {})),
        curves(
            "mixed_groups",
            "Groups whose rewards differ",
            "share of the groups",
            {"mixed": run.metrics.series("reward/mixed_groups")},
            note="Without a critic only these have advantages other than 0.",
            zero=True,
        ),
        curves(
            "lengths",
            "Tokens of a trajectory",
            "tokens",
            {
                "response": run.metrics.series("rollout/response_tokens"),
                "longest": run.metrics.series("rollout/response_tokens_max"),
                "written by the policy": run.metrics.series("rollout/sampled_tokens"),
            },
        ),
    ]
    ends = [str(end) for end in End]
    total = sum(numbers["groups"].values()) if numbers else 0
    return part("ledger", "Data ledger", prefix=prefix, figures=figures, numbers=numbers, ends=ends, total=total)
