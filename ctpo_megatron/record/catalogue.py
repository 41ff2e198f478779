"""Every metric of a run: what it is called, its unit, what it means, and how values of it are joined.

A metric that is not listed here is not recorded. docs/metrics.md and TensorBoard's charts are made from this list.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ctpo_megatron.errors import near_miss


class Reduction(enum.StrEnum):
    """How values of a metric become one, over micro-batches, ranks and optimizer steps."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    LAST = "last"


_PLACEHOLDERS = dict.fromkeys(("{benchmark}", "{term}", "{teacher}"), "[A-Za-z0-9_-]+")  # that stand for no whole number


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or a family of them whose `name` has a `{placeholder}` for a whole number; `{benchmark}`, `{term}`,
    `{teacher}`: a name."""

    name: str
    unit: str  # `share`: of 1; `ratio`: no unit, around 1; `nats`: of log-probs
    meaning: str
    reduction: Reduction = Reduction.MEAN
    watched: bool = False  # TensorBoard has its extremes over windows of steps, and its points by samples, too

    @property
    def group(self) -> str:
        """The name's first part, which TensorBoard sorts by."""
        return self.name.partition("/")[0]

    @property
    def is_family(self) -> bool:
        """Whether the name has a placeholder."""
        return "{" in self.name

    @property
    def pattern(self) -> str:
        """A regular expression for the names of the family, or for the one name."""
        return "".join(_PLACEHOLDERS.get(part, r"\d+") if part.startswith("{") else re.escape(part) for part in self._parts)

    @property
    def _parts(self) -> list[str]:
        return re.split(r"(\{\w+\})", self.name)


SUM, MEAN, MAX, MIN, LAST = Reduction.SUM, Reduction.MEAN, Reduction.MAX, Reduction.MIN, Reduction.LAST

REWARD = (
    Metric("reward/mean", "reward", "Mean reward of the trajectories that the step trained on.", watched=True),
    Metric("reward/std", "reward", "Standard deviation of these rewards.", watched=True),
    Metric(
        "reward/mixed_groups", "share", "Groups whose rewards differ; without a critic only these have advantages other than 0."
    ),
    Metric(
        "reward/undecided",
        "answers",
        "Answers that were judged without a verdict: no end in time, nonsense, an error; their reward is 0.",
        SUM,
    ),
    Metric(
        "reward/term/{term}",
        "reward",
        "A term of a combined reward before its weight, or a number that came with a reward, in the mean of those that have it.",
    ),
)
ROLLOUT = (
    Metric(
        "rollout/response_tokens", "tokens", "Tokens after the prompt, those of the tool included, per trajectory.", watched=True
    ),
    Metric("rollout/response_tokens_max", "tokens", "The same of the longest trajectory.", MAX, watched=True),
    Metric("rollout/sampled_tokens", "tokens", "Tokens that the policy wrote, per trajectory."),
    Metric("rollout/prompt_tokens", "tokens", "Tokens of the prompt, per trajectory."),
    Metric("rollout/turns", "turns", "Turns of the policy, per trajectory."),
    Metric("rollout/branches", "branches", "Samples besides its last conversation that an agent left behind, per trajectory."),
    Metric(
        "rollout/truncated",
        "share",
        "Trajectories that ended otherwise than by a finished turn: a budget, or as below.",
        watched=True,
    ),
    Metric("rollout/deadline", "share", "Trajectories that `rollout.deadline_s` ended."),
    Metric("rollout/unanswered", "share", "Trajectories whose agent ended after a call that nothing came back to."),
    Metric("rollout/staleness_mean", "versions", "How much older than the trained policy the one was that wrote a token."),
    Metric("rollout/staleness_max", "versions", "The same of the oldest token.", MAX),
    Metric("tool/rate", "share", "Trajectories that called the tool."),
    Metric("tool/calls", "calls", "Calls of the tool, per trajectory."),
    Metric("tool/error_rate", "share", "Calls of the tool in which the policy's code failed.", watched=True),
)
LEDGER = (
    Metric("ledger/filtered", "groups", "Groups with equal rewards that were replaced since the step before.", SUM),
    Metric("ledger/failed", "groups", "Groups that were replaced because one of their attempts failed too often.", SUM),
    Metric("ledger/aborted", "groups", "Groups that became too old to be trained on.", SUM),
    Metric("ledger/carried", "groups", "Groups of the step that had gone on from an earlier one, with `train.oversample`.", SUM),
    Metric(
        "ledger/kept_length",
        "ratio",
        "Mean tokens of the attempts that were trained on over those of all, in the whole run; below 1: short ones are favoured.",
        LAST,
    ),
    Metric(
        "ledger/kept_reward",
        "reward",
        "Mean reward of the attempts that were trained on minus that of all, in the whole run; above 0: easy ones are favoured.",
        LAST,
    ),
)
TRAIN = (
    Metric(
        "train/loss",
        "loss",
        "Loss of an optimizer step, as `algorithm.aggregation` weighs tokens, penalty and value loss included.",
        watched=True,
    ),
    Metric("train/grad_norm", "norm", "Norm of the gradient before it is clipped."),
    Metric("train/grad_norm_max", "norm", "The largest such norm of the optimizer steps.", MAX, watched=True),
    Metric("train/lr", "rate", "Learning rate."),
    Metric(
        "train/skipped_steps",
        "steps",
        "Optimizer steps that were not made because a loss, log-prob or gradient was not finite, and those left out behind them.",
        SUM,
        watched=True,
    ),
    Metric("train/tokens", "tokens", "Tokens of the policy that were trained on, each optimizer step counting its own.", SUM),
    Metric(
        "train/waits/rank_{n}",
        "share",
        "Of an update, the time in which one of the first 64 ranks exchanged data with pipeline neighbours or summed gradients "
        "with its replicas: the transfer, and waiting for whoever is behind.",
    ),
    Metric("train/spared", "share", "Samples without a pass: of no advantage, and not needed to measure the drift."),
    Metric("train/entropy", "nats", "Entropy of the policy's distribution, per token that it wrote.", watched=True),
    Metric(
        "train/support_mass",
        "share",
        "Probability, under the trained policy, of all tokens that truncated sampling could have drawn; with truncation only.",
    ),
    Metric(
        "train/kl_old",
        "nats",
        "Estimate of the distance to the policy of the ratios: minus the log-ratio, per token.",
        watched=True,
    ),
    Metric("train/kl", "nats", "Distance to the reference policy by the chosen estimator, per token; with a reference only."),
    Metric("train/ratio", "ratio", "The objective's unclipped ratio, per token."),
    Metric("train/ratio_sq", "ratio", "Its square."),
    Metric("train/ratio_max", "ratio", "The largest ratio.", MAX, watched=True),
    Metric("train/ratio_min", "ratio", "The smallest ratio.", MIN, watched=True),
    Metric("train/log_ratio_sq", "nats²", "Square of the objective's log-ratio, per token."),
    Metric("train/clip_fraction", "share", "Tokens without a gradient because a bound was crossed.", watched=True),
    Metric("train/clip_high", "share", "Tokens that the upper bound clipped."),
    Metric("train/clip_low", "share", "Tokens that the lower bound clipped."),
    Metric("train/clip_dual", "share", "Tokens that the dual bound clipped: a large ratio and a negative advantage."),
    Metric("train/correction", "ratio", "Weight that corrects for the engine's distribution, per token; with a correction only."),
    Metric("train/correction_zero", "share", "Tokens whose such weight is 0."),
    Metric("train/correction_sq", "ratio", "Square of such a weight."),
    Metric("train/correction_max", "ratio", "The largest such weight.", MAX),
    Metric("train/correction_before", "ratio", "Such a weight before it is held to its range or masked, per token."),
    Metric("train/correction_before_max", "ratio", "The largest of these.", MAX),
    Metric("train/correction_log", "nats", "The logarithm of such a weight before that, per token."),
    Metric(
        "train/band",
        "ratio",
        "What the bounds of a token grew with, over its position; with a measured `algorithm.objective.band` only.",
    ),
    Metric("train/delight", "ratio", "Weight of what is surprising and good, per token; with `algorithm.delight` only."),
    Metric("sft/loss", "nats", "Supervised loss of an optimizer step, per token."),
    Metric("sft/epoch", "epochs", "Examples that were trained on, over the number of demonstrations.", LAST),
    Metric("sft/eval_loss", "nats", "Supervised loss of the held-out demonstrations, per token.", watched=True),
    Metric("sft/loss_smoothed", "nats", "Moving average of that loss, which `sft.stop_loss` looks at.", LAST),
)
TEACHING = (
    Metric(
        "teacher/kl",
        "nats",
        "Estimate of KL(policy || teacher), the reverse KL divergence: the engine's log-prob less the teacher's, per token that "
        "is taught; with `algorithm.distillation` only.",
        watched=True,
    ),
    Metric("teacher/kl/{teacher}", "nats", "The same, per token that this teacher teaches."),
    Metric("teacher/weight", "ratio", "How much a token counts by its place in the sequence: IW-OPD's weight, per token."),
    Metric("teacher/seconds", "seconds", "From the request to the answer of a teacher on a server, per sequence."),
    Metric("teacher/retries", "requests", "Requests to teachers on servers that were sent again.", SUM),
)
CRITIC = (
    Metric("critic/loss", "loss", "Value loss per token before `coeff`; with a critic (`algorithm.advantage.type: gae`) only."),
    Metric("critic/clip_fraction", "share", "Tokens whose value has moved so far that the clipped error counts."),
    Metric(
        "critic/explained_variance",
        "share",
        "1 − variance of (return − value) over that of returns, with the values before the step; 0: no better than one number.",
        watched=True,
    ),
    Metric("critic/value", "reward", "Value before the step, per token that the policy wrote."),
    Metric("critic/return", "reward", "What values are to learn: the lambda-return, per such token."),
    Metric("critic/advantage", "reward", "Their difference, per such token, before it is whitened."),
    Metric("critic/advantage_std", "reward", "Standard deviation of that."),
    Metric("critic/grad_norm", "norm", "Norm of the value head's gradient before it is clipped."),
    Metric("critic/lr", "rate", "Learning rate of the value head."),
)
AGREEMENT = (
    Metric(
        "drift/mean",
        "nats",
        "Distance of the trainer's and the engine's log-probs, per token of the present version.",
        watched=True,
    ),
    Metric("drift/max", "nats", "The largest such distance.", MAX, watched=True),
    Metric(
        "drift/from_token_{position}",
        "nats",
        "The mean distance on tokens with N ≤ t < 2N among the policy's tokens of their trajectory, N the name's number.",
    ),
    Metric("routing/replayed", "share", "Tokens that the trainer sends to the experts that the engine chose."),
    Metric("routing/changed", "share", "Replayed choices that the trainer's own routers would have made differently."),
    Metric("moe/load_max_over_mean/layer_{n}", "ratio", "Tokens of a layer's busiest expert over the mean; 1 is even."),
    Metric("moe/load_entropy/layer_{n}", "share", "Entropy of a layer's load over its largest value; 1 is even."),
)
HEALTH = (
    Metric(
        "health/log_ratio_std/from_token_{position}",
        "nats",
        "Standard deviation of S_t over the tokens with N ≤ t < 2N, N the name's number (the last: all from there on).",
    ),
    Metric("health/log_ratio_mean/from_token_{position}", "nats", "Mean of S_t over the same tokens."),
    Metric("health/log_ratio_fit/from_token_{position}", "nats", "σ √t at the mean t of the same tokens: the fitted line."),
    Metric("health/log_ratio_sigma", "nats", "σ of the fitted law std(S_t) = σ √t, through the origin."),
    Metric("health/log_ratio_growth", "exponent", "b of std(S_t) ∝ t^b; 0.5 is the square root."),
    Metric(
        "health/clip_fraction/decile_{k}",
        "share",
        "Clipped tokens (upper, lower or dual) among those with k/10 to (k+1)/10 of their trajectory's tokens before them.",
    ),
    Metric(
        "health/effective_sample_size",
        "share",
        "(Σ w)² / (n Σ w²) of the unclipped ratios w over n tokens: 1 where all are equal, 1/n where one is all.",
        watched=True,
    ),
    Metric("health/correction_sample_size", "share", "The same of the weights of a correction, as they are used.", watched=True),
)
EVALUATION = (
    Metric(
        "eval/accuracy",
        "reward",
        "Mean reward of each benchmark, and of these the mean; left out where only some were due.",
        watched=True,
    ),
    Metric("eval/tool_rate", "share", "Trajectories of the evaluation that called the tool."),
    Metric("eval/response_tokens", "tokens", "Tokens after the prompt, per trajectory of the evaluation."),
    Metric("eval/accuracy/{benchmark}", "reward", "avg@n: mean reward of all attempts at a benchmark's problems.", watched=True),
    Metric("eval/accuracy_low/{benchmark}", "reward", "The lower end of its 95 % interval, by bootstrap over problems."),
    Metric("eval/accuracy_high/{benchmark}", "reward", "The upper end of that."),
    Metric("eval/pass_at_{k}/{benchmark}", "share", "pass@k: the chance that of k attempts at a problem one is right."),
    Metric("eval/pass_at_{k}_low/{benchmark}", "share", "The lower end of its 95 % interval, by bootstrap over problems."),
    Metric("eval/pass_at_{k}_high/{benchmark}", "share", "The upper end of that."),
    Metric("eval/maj_at_{k}/{benchmark}", "share", "maj@k: the chance that the most frequent answer of k attempts is right."),
    Metric("eval/maj_at_{k}_low/{benchmark}", "share", "The lower end of its 95 % interval, by bootstrap over problems."),
    Metric("eval/maj_at_{k}_high/{benchmark}", "share", "The upper end of that."),
)
SERVERS = (
    Metric("servers/serving", "servers", "Inference servers that serve after the publication.", LAST),
    Metric("servers/aside", "servers", "Inference servers that keep older weights, for an evaluation beside training.", LAST),
    Metric("servers/lost", "servers", "Losses of servers since the command began.", LAST),
    Metric("servers/waiting", "requests", "The longest queue of a server that was seen since the last publication.", MAX),
    Metric("servers/retracted", "requests", "The most that a server had taken back to its queue, its KV cache being full.", MAX),
    Metric("servers/cache_use", "share", "The most that was seen in use of a server's KV cache.", MAX),
    Metric("servers/limit", "requests", "What all servers may be sent at a time, where that is bounded.", LAST),
    Metric("servers/moved", "requests", "Requests that left a slow server for another, since the command began.", LAST),
    Metric("servers/rejoined", "servers", "Returns of servers that were lost, since the command began.", LAST),
    Metric(
        "servers/busy/server_{n}",
        "share",
        "Of a step up to its publication, the time in which one of the first 64 servers had a generation to work on.",
    ),
    Metric("servers/throughput/server_{n}", "tokens/s", "What a server said that it samples, in the mean of all looks at it."),
    Metric(
        "servers/queue/server_{n}", "requests", "The longest queue of a server that was seen since the last publication.", MAX
    ),
    Metric(
        "servers/cache_hits/server_{n}", "share", "Prompt tokens that a server found in its prefix cache, in the mean of looks."
    ),
    Metric("servers/kv_use/server_{n}", "share", "The most that was seen in use of a server's KV cache.", MAX),
    Metric("servers/memory/server_{n}", "GiB", "Resident memory of all processes of a server.", LAST),
    Metric("servers/memory_slope/server_{n}", "GiB/h", "How fast that grew, over the last hour; not in the first minutes.", LAST),
)
HOST = (
    Metric("host/memory", "GiB", "Memory in use on the driver's host.", LAST),
    Metric("host/memory_used", "share", "The same as a share of what the host has.", LAST),
    Metric("host/memory_slope", "GiB/h", "How fast that grew, over the last hour; not in the first minutes.", LAST),
    Metric("host/driver_memory", "GiB", "Resident memory of the driver.", LAST),
    Metric("host/driver_memory_slope", "GiB/h", "How fast that grew, over the last hour; not in the first minutes.", LAST),
    Metric("host/trainer_memory", "GiB", "Resident memory of the trainer rank that has most.", MAX),
    Metric("host/trainer_memory_slope", "GiB/h", "How fast that of the rank grew whose memory grew fastest.", MAX),
    Metric("host/cpu", "share", "Use of the driver's host's CPUs since the step before.", LAST),
    Metric("host/disk_free", "GiB", "Room that is left on the file system of the run's directory.", LAST),
)
PUBLICATION = (
    Metric("publish/total", "seconds", "The whole publication of a step's weights, over all attempts.", SUM),
    Metric("publish/prepare", "seconds", "Gathering the first bucket; the servers sample meanwhile.", SUM),
    Metric("publish/paused", "seconds", "How long the servers stood still, from the first pause to the last resume.", SUM),
    Metric("publish/pause", "seconds", "Stopping generation and opening the update.", SUM),
    Metric("publish/wake", "seconds", "Servers on the trainer's GPUs taking memory back.", SUM),
    Metric("publish/connect", "seconds", "Joining senders and servers, where servers have changed.", SUM),
    Metric("publish/transfer", "seconds", "From the first bucket to the last.", SUM),
    Metric("publish/gather", "seconds", "Gathering tensors from the trainer's ranks, added up over senders.", SUM),
    Metric("publish/digest", "seconds", "Hashing them, added up over senders.", SUM),
    Metric("publish/send", "seconds", "Sending them, added up over senders.", SUM),
    Metric("publish/wait", "seconds", "The senders' waiting for servers or other ranks, added up over them.", SUM),
    Metric("publish/attest", "seconds", "Comparing what the servers hold with what was sent.", SUM),
    Metric("publish/canary", "seconds", "Comparing what trainer and servers compute.", SUM),
    Metric("publish/canary_gap_mean", "nats", "The canary's mean distance of log-probs, of the server furthest off.", MAX),
    Metric("publish/canary_gap_max", "nats", "The canary's largest distance of one token's log-probs, over all servers.", MAX),
    Metric(
        "publish/changed",
        "share",
        "The servers' tensors that differ from the version before; 0 where the weights moved: old ones were sent.",
        LAST,
    ),
)
PROGRESS = (Metric("progress/samples", "samples", "Trajectories that were trained on since the run began.", LAST),)
TIME = (
    Metric("time/step", "seconds", "The whole training step.", SUM, watched=True),
    Metric("time/rollout", "seconds", "Waiting for the step's groups.", SUM, watched=True),
    Metric("time/rollout_tail", "seconds", "Of that, waiting for the last fifth: for long responses, or a slow server.", SUM),
    Metric("time/batch", "seconds", "Advantages and packing.", SUM),
    Metric("time/sleep", "seconds", "Servers on the trainer's GPUs giving memory back.", SUM),
    Metric("time/train", "seconds", "Log-probs, gradients and optimizer steps.", SUM),
    Metric("time/publish", "seconds", "Publishing the new weights.", SUM),
    Metric("time/checkpoint", "seconds", "Training standing still for a checkpoint.", SUM),
    Metric("time/eval", "seconds", "The evaluation, from its beginning to its end.", SUM),
    Metric("time/eval_stood_still", "seconds", "How long of that training stood still.", SUM),
    Metric(
        "perf/rollout_tokens_per_s", "tokens/s", "Tokens that the policy wrote, by the seconds of `time/rollout`.", watched=True
    ),
    Metric("perf/train_tokens_per_s", "tokens/s", "Tokens of whole trajectories, by the seconds of `time/train`."),
)
CATALOGUE: tuple[Metric, ...] = (
    *REWARD,
    *EVALUATION,
    *ROLLOUT,
    *LEDGER,
    *TRAIN,
    *TEACHING,
    *CRITIC,
    *AGREEMENT,
    *HEALTH,
    *PROGRESS,
    *TIME,
    *PUBLICATION,
    *SERVERS,
    *HOST,
)


@functools.cache
def find(name: str) -> Metric | None:
    """Returns the metric or the family that `name` belongs to; None where there is none."""
    return next((metric for metric in CATALOGUE if re.fullmatch(metric.pattern, name)), None)


def require_known(names: Iterable[str]) -> None:
    """Raise ValueError for the first of `names` that is not in the catalogue."""
    for name in names:
        if find(name) is None:
            known = [metric.name for metric in CATALOGUE]
            raise ValueError(f"{name!r} is not a metric of record/catalogue.py; list it there.{near_miss(name, known)}")


def charts() -> dict[str, dict[str, list[str | list[str]]]]:
    """Returns TensorBoard's charts: of each group one for every unit, and one for every family of metrics.

    It is the layout that tensorboardX takes: category -> title -> kind of chart, regular expressions of the names in it.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for metric in CATALOGUE:
        title = metric.name.rpartition("/")[0] if metric.is_family else metric.unit
        title = f"{metric.group}: {title.removeprefix(metric.group + '/')}"
        found.setdefault(metric.group, {}).setdefault(title, []).append(f"^{metric.pattern}$")
    return {group: {title: ["Multiline", names] for title, names in by_title.items()} for group, by_title in found.items()}
