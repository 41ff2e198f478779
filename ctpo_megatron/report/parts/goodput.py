"""Where the time of all incarnations went."""

from __future__ import annotations

from typing import Any

from ctpo_megatron.record.goodput import USEFUL, Account, Cause
from ctpo_megatron.report.figures import times
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.reading.run import Run

MEANING = {
    Cause.ROLLOUT: "waiting for a step's groups, until 80 % of them are in",
    Cause.TAIL: "and from then on",
    Cause.TRAIN: "advantages, packing, log-probs, gradients, optimizer steps",
    Cause.PUBLISH: "weights to the servers; their memory given back and taken again",
    Cause.EVALUATE: "evaluations that training stood still for",
    Cause.CHECKPOINT: "standing still for checkpoints",
    Cause.OTHER: "of steps, between their phases; and the step under way",
    Cause.STALL: "something hung or the disk took nothing, until that was dealt with",
    Cause.LOST: "steps that are not part of the final history, and what was under way at an end",
    Cause.START: "of the first incarnation, until its first step may begin",
    Cause.RESTART: "of later incarnations and of the trainer",
    Cause.STOP: "from the wish to stop, or the last step, to the end",
    Cause.WAIT: "between two allocations",
}


def goodput(run: Run, prefix: str) -> Part:
    """Returns the account of a run."""
    measured = run.goodput
    if measured is None:
        return part("goodput", "Goodput", prefix=prefix, rows=[], measured=None, incarnations=[])
    total = measured.total
    shares = total.shares(allocated=False)
    rows = [
        {
            "cause": str(cause),
            "seconds": total.seconds[cause],
            "share": shares[cause],
            "meaning": MEANING[cause],
            "useful": cause in USEFUL,
        }
        for cause in Cause
        if total.milliseconds.get(cause)
    ]
    incarnations = [_incarnation(run, number, account) for number, account in measured.incarnations.items()]
    return part(
        "goodput",
        "Goodput",
        prefix=prefix,
        figures=[times.goodput(measured)],
        numbers=measured.summary(),
        rows=rows,
        measured=measured,
        incarnations=incarnations,
    )


def _incarnation(run: Run, number: int, account: Account) -> dict[str, Any]:
    told = run.story.incarnations[number - 1]
    fields = told.began.fields
    return {
        "number": number,
        "began": told.began.time,
        "whence": "anew" if fields.get("checkpoint") is None else f"step {fields.get('step')}",
        "host": fields.get("host"),
        "job": fields.get("job"),
        "how": told.how or "no end is written",
        "reason": "" if told.ended is None else told.ended.fields.get("reason") or "",
        "seconds": account.elapsed / 1000,
        "goodput": account.goodput,
    }
