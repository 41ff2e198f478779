"""A task for rewards: sums of two digits, their last digit as the answer, and a cold start that only knows how an answer looks.

    .venv/bin/python examples/sums.py runs/sums/data                          # prompts, and answers at random
    .venv/bin/python tools/make_toy_model.py runs/sums/base
    .venv/bin/ctpo sft examples/sums_sft.yaml
    PYTHONPATH=. .venv/bin/ctpo train examples/function.yaml                  # or combination.yaml, code.yaml, judge.yaml

A question ends with `?` and wants a box, or with `!` and wants a program that prints the digit.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

LONG = 12  # characters of an answer that is longer than it needs to be


def brief(sample: dict[str, Any]) -> dict[str, float]:
    """Returns a reward of one's own: 1 for the right digit in a box, half of it for an answer with more words than that."""
    right = float(f"\\boxed{{{sample['answer']}}}" in sample["text"])
    long = len(sample["text"]) > LONG
    return {"reward": right * (0.5 if long else 1.0), "accuracy": right, "long": float(long)}


def question(row: int, first: int, second: int, end: str) -> list[dict[str, str]]:
    """Returns a prompt; its number makes each another one."""
    return [{"role": "user", "content": f"{row}: {first} + {second}{end}"}]


def prompts(rng: random.Random, rows: int, first: int, *, code: bool) -> list[dict[str, Any]]:
    """Returns questions with what is right: a digit, or tests of a program."""
    found = []
    for row in range(first, first + rows):
        one, other = rng.randrange(10), rng.randrange(10)
        right = str((one + other) % 10)
        known = json.dumps({"inputs": [""], "outputs": [right]}) if code else right
        found.append({"prompt": question(row, one, other, "!" if code else "?"), "reward_model": {"ground_truth": known}})
    return found


def demonstrations(rng: random.Random, rows: int) -> list[dict[str, Any]]:
    """Returns answers of either kind with any digit: they teach how an answer looks, not which is right."""
    found = []
    for row in range(rows):
        end, digit = rng.choice("?!"), rng.randrange(10)
        said = f"\\boxed{{{digit}}}" if end == "?" else f"```python\nprint({digit})\n```"
        asked = question(row, rng.randrange(10), rng.randrange(10), end)
        found.append({"messages": [*asked, {"role": "assistant", "content": said}]})
    return found


def write(directory: Path, seed: int = 1, rows: int = 4096) -> None:
    """Write train.parquet, eval.parquet, code.parquet and sft.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    tables = {
        "train": prompts(rng, rows, 10_000, code=False),
        "eval": prompts(rng, 128, 90_000, code=False),
        "code": prompts(rng, rows, 10_000, code=True),
        "sft": demonstrations(rng, rows),
    }
    for name, table in tables.items():
        pq.write_table(pa.Table.from_pylist(table), directory / f"{name}.parquet")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
