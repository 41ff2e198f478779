"""Rules about how a run goes: its end, what it lost, where time goes, what is not proven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ctpo_megatron.record.elastic_events import NodesLost
from ctpo_megatron.record.events import CheckpointDamaged, CheckpointLost, ServerLost
from ctpo_megatron.record.goodput import USEFUL, Cause
from ctpo_megatron.record.run_events import TrainerRestarting
from ctpo_megatron.record.storage_events import StorageFault
from ctpo_megatron.record.watch_events import StallFound
from ctpo_megatron.report.findings.finding import Finding, scaled
from ctpo_megatron.report.parts.standing import standing
from ctpo_megatron.report.reading.happenings import sentence
from ctpo_megatron.report.reading.run import Run

RAISED, CLEARED = "alarm raised", "alarm cleared"
LONG_S = 300.0  # below which a run is all start, and goodput says nothing


def end(run: Run) -> Iterator[Finding]:
    """Yields an end that was not in order."""
    stands = standing(run)
    if stands.word in ("failed", "killed", "cancelled"):
        yield Finding(100 if stands.word == "failed" else 90, f"The run {_ENDED[stands.word]}", stands.sentence, "events")


_ENDED = {"failed": "failed", "killed": "was killed", "cancelled": "was cancelled"}


def alarms(run: Run) -> Iterator[Finding]:
    """Yields alarms that were raised and not cleared. Each has a name, and what it is about in `where`."""
    raised: dict[tuple[str, str], str] = {}
    for each in run.events:
        key = str(each.fields.get("alarm")), str(each.fields.get("where"))
        if each.name == RAISED:
            raised[key] = sentence(each)
        if each.name == CLEARED:
            raised.pop(key, None)
    for (name, _), words in raised.items():
        yield Finding(80, f"Alarm: {name}", words, "events")


def losses(run: Run) -> Iterator[Finding]:
    """Yields what died, hung or was damaged."""
    counts = Counter(each.name for each in run.events)
    told = (
        (StallFound.name, "A stall", "stalls", 70.0),
        (NodesLost.name, "Nodes were lost", "times nodes were lost", 60.0),
        (TrainerRestarting.name, "A restart of the trainer", "restarts of the trainer", 55.0),
        (ServerLost.name, "A server was lost", "losses of servers", 40.0),
        (StorageFault.name, "A fault of the disk", "faults of the disk", 55.0),
        (CheckpointLost.name, "A lost checkpoint", "lost checkpoints", 75.0),
        (CheckpointDamaged.name, "A damaged checkpoint", "damaged checkpoints", 85.0),
    )
    for name, one, several, weight in told:
        if counts[name]:
            first = sentence(run.happened(name)[0])
            if counts[name] == 1:
                yield Finding(weight, one, f"{first[0].upper()}{first[1:]}", "events")
            else:
                yield Finding(weight, f"{counts[name]} {several}", f"The first: {first}", "events")


def skipped(run: Run) -> Iterator[Finding]:
    """Yields optimizer steps that were not made because something was not finite."""
    count = run.metrics.total("train/skipped_steps")
    if count:
        words = "A loss, log-prob or gradient was not finite; `ctpo replay RUN_DIR/dumps/...` says where that arises."
        yield Finding(scaled(count, 1, 20, (65, 85)), f"{count:.0f} optimizer steps were left out", words, "events")


def time(run: Run) -> Iterator[Finding]:
    """Yields the largest share of the time that was not useful, and a rollout tail that idles the servers."""
    if run.goodput is None or run.goodput.total.elapsed < LONG_S * 1000:
        return
    total = run.goodput.total
    shares = total.shares(allocated=True)
    useless = {cause: share for cause, share in shares.items() if cause not in USEFUL}
    worst = max(useless, key=lambda cause: useless[cause])
    if useless[worst] > 0.1:
        yield Finding(
            scaled(useless[worst], 0.1, 0.6, (30, 70)),
            f"Goodput is {total.goodput:.0%}: {useless[worst]:.0%} of the time went into {worst}",
            "",
            "goodput",
        )
    else:
        yield Finding(
            4, f"Goodput is {total.goodput:.0%}", f"The largest other share is {worst}, {useless[worst]:.0%}.", "goodput"
        )
    if shares[Cause.TAIL] > 0.2:
        yield Finding(
            scaled(shares[Cause.TAIL], 0.2, 0.6, (30, 55)),
            f"{shares[Cause.TAIL]:.0%} of the time is waiting for the last fifth of the groups",
            "Servers idle meanwhile: `train.oversample`, `train.staleness` or a deadline shortens it.",
            "goodput",
        )


def bias(run: Run) -> Iterator[Finding]:
    """Yields data that is lost in a way that favours short or easy prompts."""
    metrics = run.metrics
    kept, reward = metrics.last("ledger/kept_length"), metrics.last("ledger/kept_reward")
    if kept is not None and not 0.93 <= kept <= 1.07:
        words = f"Attempts that were trained on have {kept:.2f} times the tokens of all that ended."
        yield Finding(
            scaled(abs(kept - 1), 0.07, 0.4, (25, 60)),
            f"{'Short' if kept < 1 else 'Long'} attempts are favoured",
            words,
            "by_length",
        )
    if reward is not None and abs(reward) > 0.1:
        words = f"Attempts that were trained on have {reward:+.2f} of the mean reward of all that ended."
        yield Finding(
            scaled(abs(reward), 0.1, 0.4, (20, 50)),
            f"{'Easy' if reward > 0 else 'Hard'} prompts are favoured",
            words,
            "by_difficulty",
        )


def unproven(run: Run) -> Iterator[Finding]:
    """Yields work that a death now would cost, in a run that goes on and saves."""
    every = run.setting("checkpoint.every")
    verified = [each.fields.get("step") for each in run.happened("checkpoint verified")]
    known = [each for each in verified if isinstance(each, int)]
    behind = run.metrics.last_step - max(known, default=0)
    if isinstance(every, int) and every > 0 and behind > 2 * every and standing(run).word == "open":
        yield Finding(65, f"The last verified checkpoint is {behind} steps back", f"One is due every {every} steps.", "proofs")


def damage(run: Run) -> Iterator[Finding]:
    """Yields files of the run that cannot be read."""
    bad = [each for each in run.complaints if "not there" not in each]
    if bad:
        yield Finding(50, "Parts of the run directory cannot be read", " ".join(bad), "overview")
