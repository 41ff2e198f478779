"""Where a run stands: done, stopped, failed, killed, or going on as far as its files say."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.record.events import RunDone
from ctpo_megatron.report.reading.run import Run


@dataclass(frozen=True, slots=True)
class Standing:
    """`word`: done, stopped, cancelled, failed, killed, open (no end is written) or unknown. `of`: the steps that are wanted."""

    word: str
    sentence: str
    step: int
    of: int | None
    last_sign: float | None  # seconds since 1970

    @property
    def good(self) -> bool:
        """Whether nothing needs to be done about it."""
        return self.word in ("done", "open")


def standing(run: Run) -> Standing:
    """Returns where `run` stands."""
    lives, step = run.story.incarnations, run.metrics.last_step
    told = lives[-1].began.fields.get("total") if lives else None  # `ctpo sft` counts steps of its own
    steps = run.setting("train.steps") if told is None else told
    of = steps if isinstance(steps, int) and steps >= step else None
    word, sentence = _word(run)
    return Standing(word, sentence, step, of, run.last_sign)


def _word(run: Run) -> tuple[str, str]:
    if not run.story.incarnations:
        if run.happened(RunDone.name):
            return "done", "The run is done."
        return "unknown", "No event says whether the run goes on or has ended."
    last = run.story.incarnations[-1]
    reason = "" if last.ended is None else str(last.ended.fields.get("reason") or "")
    if last.how is None:
        return "open", "No end is written: the run goes on, or was killed and has not been started since."
    told = {
        "done": "The run is done: it came to its last step.",
        "stopped": f"The run was stopped in order ({reason}); `--resume auto` goes on.",
        "cancelled": f"The run was cancelled ({reason}); `--resume auto` goes on from its last checkpoint.",
        "failed": f"The run failed: {reason}",
        "killed": "The run was killed; `--resume auto` goes on from its last checkpoint.",
    }
    return last.how, told.get(last.how, f"The run ended: {last.how}.")
