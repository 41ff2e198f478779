"""What alarms say: what each of them is, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """What an alarm says: what it is, and what to do."""

    what: str
    advice: str


WORDS = {
    "entropy": Words(
        "the policy loses its choices, or comes apart, and the reward is no better",
        "Lower optimizer.lr or train.optimizer_steps, or widen the objective's upper bound; go back to a checkpoint from before.",
    ),
    "plateau": Words(
        "the reward has not improved for long",
        "Look at rollouts: prompts may be too hard or too easy (reward/mixed_groups); change data.curriculum, or stop.",
    ),
    "length": Words(
        "responses change their length, and answers are no better",
        "Read the longest and the shortest rollouts: the reward may pay for length; see algorithm.shaping and docs/rewards.md.",
    ),
    "format": Words(
        "more responses break off or go wrong in form, and answers are no better",
        "Read rollouts that were truncated or whose calls failed; look at rollout.max_response_tokens and at the reward's terms.",
    ),
    "accuracy": Words(
        "accuracy on held-out prompts falls behind its best",
        "Compare reward/mean: where it still rises, the reward pays for something else; else lower optimizer.lr, and go back.",
    ),
    "clip": Words(
        "clipping by position is out of its band",
        "docs/health.md has the causes: fewer train.optimizer_steps, a lower optimizer.lr, or other bounds of the objective.",
    ),
    "drift": Words(
        "trainer and engine agree less and less",
        "Compare dtype and attention backend of both, and publish/canary_gap_mean; drift.mean ends the run (docs/health.md).",
    ),
    "sample_size": Words(
        "a few tokens carry most of the gradient",
        "Look at train/ratio_max and health/log_ratio_sigma; fewer train.optimizer_steps, a lower optimizer.lr, less staleness.",
    ),
    "mismatch": Words(
        "weights of algorithm.correction run away from 1, before they are held to their range",
        "Set algorithm.correction.level=geometric or token (docs/mismatch.md), or bring trainer and engine closer together.",
    ),
    "stale": Words(
        "rollouts fall behind the trainer",
        "More or faster servers, a lower train.staleness, or bounds on long responses; look at servers/waiting and time/rollout.",
    ),
    "experts": Words(
        "a layer sends most of its tokens to a few experts",
        "Raise moe.aux_loss_coeff or moe.bias_update_rate; look at moe/load_entropy, and at drift/mean (routing replay).",
    ),
    "servers": Words(
        "servers are slow or keep failing",
        "Look at the server's log and its host; rollout.engine.traffic.moving leads requests away from a slow one.",
    ),
    "memory": Words(
        "the memory of the driver's host runs towards its end",
        "Look at the processes there; save with a file SAVE in the run directory, and resume before the host ends the run.",
    ),
    "equal_groups": Words(
        "most groups have equal rewards, and nothing is learnt from them",
        "Take prompts of another difficulty (data.curriculum, data.pools), replace them (rollout.dynamic), or enlarge groups.",
    ),
    "undecided": Words(
        "the grader gives no verdict on many answers, which count as wrong",
        "`why` in RUN_DIR/rollouts says what happened; see docs/rewards.md.",
    ),
    "goodput": Words(
        "little of the time goes into rollouts and training",
        "The event `goodput` and `ctpo train`'s summary say where it goes: restarts, evaluations, checkpoints, the disk.",
    ),
}
