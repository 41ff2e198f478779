"""How often the grader is right on pairs of answers, by kind, beside math-verify as it comes, and how long a verdict takes.

    python tools/bench_verdicts.py [tests/data/verdicts.jsonl ...]

Each line of a file is {"kind": ..., "gold": ..., "given": ..., "equal": true or false}. A pair counts as right where both orders
of its two answers get the verdict `equal`. math-verify's defaults are its `parse` and `verify` of both answers in a box.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.rollout.protocols import Outcome as Said
from ctpo_megatron.rollout.rewards.math import MathReward
from ctpo_megatron.types import Prompt

Verdict = Callable[[str, str], bool]
PAIRS = Path(__file__).resolve().parents[1] / "tests" / "data"
TIMEOUT_S = 60.0  # a slow host must not make a verdict wrong


@dataclass(frozen=True)
class Outcome:
    """Verdicts on one pair in both orders, and the seconds that the first took."""

    pair: dict[str, str | bool]
    verdicts: tuple[bool, bool]
    seconds: float

    @property
    def right(self) -> bool:
        """Whether both verdicts are right."""
        return all(verdict == self.pair["equal"] for verdict in self.verdicts)


def judged(pairs: list[dict[str, str | bool]], equal: Verdict) -> list[Outcome]:
    """The outcomes of `equal` on all pairs; the first pair is asked once before, so that no import is timed."""
    found = []
    for pair in [pairs[0], *pairs]:
        gold, given = str(pair["gold"]), str(pair["given"])
        begun = time.perf_counter()
        first = equal(gold, given)
        seconds = time.perf_counter() - begun
        found.append(Outcome(pair, (first, equal(given, gold)), seconds))
    return found[1:]


def by_math_verify(gold: str, given: str) -> bool:
    """math-verify's verdict with its defaults."""
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(Said(f"\\boxed{{{given}}}"))))


def by_reward(reward: MathReward, runner: asyncio.Runner) -> Verdict:
    """The verdict of a reward as training asks for it."""

    def equal(gold: str, given: str) -> bool:
        score = runner.run(reward.score(Prompt(0, (), gold), Said(f"\\boxed{{{given}}}")))
        return score.reward == 1.0

    return equal


def table(ours: list[Outcome], theirs: list[Outcome]) -> str:
    """Markdown: accuracy by kind, ours and math-verify's."""
    rows = ["| kind | pairs | here | math-verify |", "|---|--:|--:|--:|"]
    kinds = list(dict.fromkeys(str(outcome.pair["kind"]) for outcome in ours))
    for kind in [*kinds, "all"]:
        shares = [[o.right for o in outcomes if kind in ("all", o.pair["kind"])] for outcomes in (ours, theirs)]
        figures = " | ".join(f"{sum(share) / len(share):.1%}" for share in shares)
        rows.append(f"| {kind} | {len(shares[0])} | {figures} |")
    return "\n".join(rows)


def main() -> None:
    """Print the table of each file, the median times, and the pairs that were judged wrongly here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(PAIRS.glob("verdicts*.jsonl")))
    logging.disable(logging.WARNING)  # math-verify warns of each time-out
    for path in parser.parse_args().files:
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        reward = MathReward(MathRewardConfig(timeout_s=TIMEOUT_S), judges=1)
        with asyncio.Runner() as runner:
            ours = judged(pairs, by_reward(reward, runner))
            reward.close()
        theirs = judged(pairs, by_math_verify)
        print(f"\n{path.name}\n\n{table(ours, theirs)}\n")
        for name, outcomes in (("here", ours), ("math-verify", theirs)):
            print(f"median verdict, {name}: {statistics.median(outcome.seconds for outcome in outcomes) * 1e3:.2f} ms")
        for outcome in ours:
            if not outcome.right:
                print(f"wrong: {json.dumps(outcome.pair, ensure_ascii=False)}: {outcome.verdicts}")


if __name__ == "__main__":
    main()
