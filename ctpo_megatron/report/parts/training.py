"""Curves of the optimizer and of the policy."""

from __future__ import annotations

from ctpo_megatron.report.figures.curves import curves
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.reading.run import Run


def training(run: Run, prefix: str) -> Part:
    """Returns the curves that are looked at when the reward does something unexpected."""
    get = run.metrics.series
    terms = {term: get(name) for name, term in run.metrics.names(r"reward/term/([A-Za-z0-9_-]+)")}
    teachers = {teacher: get(name) for name, teacher in run.metrics.names(r"teacher/kl/([A-Za-z0-9_-]+)")}
    figures = [
        curves("entropy", "Entropy of the policy", "nats by token", {"entropy": get("train/entropy")}, zero=True),
        curves(
            "clipped", "Clipped tokens", "share", {side: get(f"train/clip_{side}") for side in ("high", "low", "dual")}, zero=True
        ),
        curves(
            "grad_norm", "Norm of the gradient", "norm", {"mean": get("train/grad_norm"), "largest": get("train/grad_norm_max")}
        ),
        curves(
            "sft_loss",
            "Supervised loss",
            "nats by token",
            {"loss": get("sft/loss"), "smoothed": get("sft/loss_smoothed"), "held out": get("sft/eval_loss")},
        ),
        curves("loss", "Loss", "loss", {"loss": get("train/loss")}),
        curves(
            "kl",
            "Distance to the policy of the ratios",
            "nats by token",
            {"KL": get("train/kl_old"), "KL to the reference": get("train/kl")},
        ),
        curves("teachers", "Distance to the teachers", "nats by token", teachers, zero=True),
        curves(
            "explained", "Variance of the returns that the critic explains", "share", {"share": get("critic/explained_variance")}
        ),
        curves("values", "The critic's values", "reward", {"values": get("critic/value"), "returns": get("critic/return")}),
        curves("learning_rate", "Learning rate", "rate", {"rate": get("train/lr")}, zero=True),
        curves(
            "staleness",
            "Age of the tokens",
            "versions",
            {"mean": get("rollout/staleness_mean"), "oldest": get("rollout/staleness_max")},
        ),
        curves(
            "tool",
            "Use of the tool",
            "share",
            {"trajectories that called": get("tool/rate"), "calls that failed": get("tool/error_rate")},
            zero=True,
        ),
        curves("terms", "Terms of the reward", "reward", terms),
        curves(
            "throughput",
            "Tokens per second",
            "tokens/s",
            {"rollout": get("perf/rollout_tokens_per_s"), "training": get("perf/train_tokens_per_s")},
            zero=True,
        ),
    ]
    last = {name: value for row in list(run.metrics.rows.values())[-1:] for name, value in row.items()}
    return part("curves", "Curves of training", prefix=prefix, figures=figures, numbers={"last_row": last})
