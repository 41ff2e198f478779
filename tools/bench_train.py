"""What the trainer's parts cost: the engine against transformers with padding, groups that read their prompt once, the head
against all logits, and balancing.

    python tools/bench_train.py                       all parts; about fifteen minutes on a quiet core, 12 GB of memory
    python tools/bench_train.py --part engine         one of engine, prompts, head, balance
    python tools/bench_train.py --json found.json     the numbers as a file too

Ends with exit code 1, and says which, when a bound is missed. What is compared runs in turn in one process with one thread; a
time is CPU seconds, the median over repeats of the ratio within each, since other work on the machine disturbs both sides of a
repeat alike. Compare ratios, not seconds. docs/bench_train.md has a run and its reading.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from bench_engine import engine_rows, prompt_rows
from bench_loss import Check, peak_bytes
from rich.console import Console
from rich.table import Table

from ctpo_megatron.data.balance import plan_micro_batches, round_up
from ctpo_megatron.parallel import vocab_parallel_logp, words

WORDS = 151_936
MAX_HEAD_MEMORY = 1 / 8  # of all logits in float32
MAX_KEPT_MEMORY = 1.1  # where the logits fit and are kept
MAX_HEAD_TIME = {"bfloat16": 1.1, "float32": 1.0, "float32, frugal": 4 / 3}  # of the naive way; 4/3: a fourth product
MIN_LONG_TAIL = 2.5  # times the tokens per second of transformers with padding; 2.4 where processors have no AVX-512
MIN_EQUAL = 0.9
MIN_SHARED = 1.5  # times the tokens per second of samples that read their own prompts, which are as long as their responses
MAX_IMBALANCE, MAX_PADDING, MAX_PLANNING_S = 0.02, 0.03, 1.0

Row = dict[str, Any]


def naive_logp(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """All logits in float32, as most trainers have them: no entropy, no temperature."""
    return torch.log_softmax((hidden @ weight.t()).float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def kept_logp(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The package's head, with the entropy that training records."""
    return vocab_parallel_logp(hidden, weight, labels).logp


def frugal_logp(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same as for a micro-batch whose logits do not fit."""
    with patch.object(words, "KEPT_ON_CPU", 0):
        return kept_logp(hidden, weight, labels)


def head_step(way: Callable, dtype: torch.dtype, tokens: int, width: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward of `way`: the label's log-probs and both gradients."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(WORDS, width, generator=generator) * width**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, WORDS, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)

    def step() -> tuple[torch.Tensor, ...]:
        logp = way(hidden, weight, labels)
        return logp.detach(), *torch.autograd.grad(logp, (hidden, weight), upstream)

    return step


def head_rows(repeats: int) -> tuple[list[Row], list[Check]]:
    """The head at the vocabulary of Qwen3. Extra memory is the peak without the two gradients, which both ways return."""
    rows, checks = [], []
    for name, tokens, width in (("bfloat16", 4096, 1024), ("float32", 1024, 1024), ("float32, frugal", 1024, 1024)):
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        blocked_logp = frugal_logp if "frugal" in name else kept_logp
        steps = {"naive": head_step(naive_logp, dtype, tokens, width), "blocks": head_step(blocked_logp, dtype, tokens, width)}
        found = {name: step() for name, step in steps.items()}
        error = max(
            ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
            for ours, theirs in zip(found["blocks"], found["naive"], strict=True)
        )
        gradients = sum(each.nbytes for each in found["naive"][1:])
        del found
        whole = 4 * tokens * WORDS
        extra = {name: (peak_bytes(step) - gradients) / whole for name, step in steps.items()}
        ratio = median_ratio(steps["blocks"], steps["naive"], repeats)
        rows.append(
            {
                "dtype": name,
                "tokens": tokens,
                "width": width,
                "extra memory / float32 logits": extra["blocks"],
                "naive": extra["naive"],
                "time / naive": ratio,
                "largest relative error": error,
            }
        )
        most, longest = MAX_KEPT_MEMORY if name == "float32" else MAX_HEAD_MEMORY, MAX_HEAD_TIME[name]
        checks += [
            Check(f"head, {name}: {extra['blocks']:.3f} of float32 logits (at most {most})", extra["blocks"] <= most),
            Check(f"head, {name}: {ratio:.2f} times the naive time (at most {longest:.2f})", ratio <= longest),
        ]
    return rows, checks


def balance_rows() -> tuple[list[Row], list[Check]]:
    """4,096 lengths with a long tail over 64 ranks of 16k tokens."""
    lengths = np.random.default_rng(3).lognormal(7.3, 1.1, 4096).clip(16, 16384).astype(int)
    rows = []
    for weight in (0.0, 1 / 4096):
        begun = time.process_time()
        plan = plan_micro_batches(lengths.tolist(), capacity=16384, dp=64, attention_weight=weight)
        seconds = time.process_time() - begun
        cost = lengths + weight * lengths.astype(float) ** 2
        of_rank = np.array([sum(cost[i] for members in rank for i in members) for rank in plan])
        # at CP 2 and TP 4 a sequence is padded to a multiple of 4 and a pack to one of 8
        positions = sum(round_up(int(lengths[members].sum()) + 3 * len(members), 8) for rank in plan for members in rank)
        rows.append(
            {
                "balanced": "flops" if weight else "tokens",
                "micro-batches per rank": len(plan[0]),
                "imbalance": float(of_rank.max() / of_rank.mean() - 1),
                "padding at most": 1 - int(lengths.sum()) / positions,
                "CPU s": seconds,
            }
        )
    by_tokens = rows[0]
    bounds = {"imbalance": MAX_IMBALANCE, "padding at most": MAX_PADDING, "CPU s": MAX_PLANNING_S}
    checks = [
        Check(f"balancing, {name}: {by_tokens[name]:.4f} (at most {most})", float(by_tokens[name]) <= most)
        for name, most in bounds.items()
    ]
    return rows, checks


def median_ratio(step: Callable[[], Any], other: Callable[[], Any], repeats: int) -> float:
    """CPU time of `step` over that of `other`, run in turn."""
    ratios = []
    for _ in range(repeats):
        seconds = []
        for each in (step, other):
            begun = time.process_time()
            each()
            seconds.append(time.process_time() - begun)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def show(console: Console, title: str, rows: list[Row]) -> None:
    """Rows of equal keys as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    console.print(table)


def main(
    part: Annotated[str, typer.Option(help="engine, prompts, head, balance or all")] = "all",
    repeats: Annotated[int, typer.Option(help="of which the median counts")] = 5,
    to: Annotated[Path | None, typer.Option("--json", help="where to write the numbers")] = None,
) -> None:
    """Print the tables and the bounds."""
    torch.set_num_threads(1)
    console = Console(width=140)
    console.print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread, load {os.getloadavg()[0]:.1f}")
    parts: dict[str, Callable[[], tuple[list[Row], list[Check]]]] = {
        "engine": lambda: engine_rows(repeats, median_ratio, MIN_LONG_TAIL, MIN_EQUAL),
        "prompts": lambda: prompt_rows(repeats, median_ratio, MIN_SHARED),
        "head": lambda: head_rows(repeats),
        "balance": balance_rows,
    }
    if part != "all" and part not in parts:
        raise typer.BadParameter(f"--part {part}: allowed are all, {', '.join(parts)}")
    found, checks = {}, []
    for name, measure in parts.items():
        if part in (name, "all"):
            found[name], more = measure()
            show(console, name, found[name])
            checks += more
    for check in checks:
        console.print(f"{'holds ' if check.holds else 'MISSED'}  {check.text}")
    if to is not None:
        to.write_text(json.dumps({"rows": found, "checks": [check._asdict() for check in checks]}, indent=2) + "\n")
    raise typer.Exit(0 if all(check.holds for check in checks) else 1)


if __name__ == "__main__":
    typer.run(main)
