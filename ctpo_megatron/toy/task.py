"""A task that a tiny model can learn in minutes, and only with the Python tool: word problems about three-digit numbers.

The demonstrations teach the format, not the task: most of them compute the wrong thing, always the same wrong thing for the
same kind of problem. Imitation alone ends with a model that is mostly wrong; which operation the words ask for can only be
learned from the reward. The files have the same format as real ones, so nothing downstream knows that this is a toy.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SMALLEST, LARGEST = 100, 999
RIGHT_SHARE = 0.3  # of the demonstrations
TOOL, ARGUMENT = "calculate", "expression"  # of demonstrations that call a tool by name
MAX_ROWS = 100_000  # far below the 4.8 million distinct problems, so drawing without repetition stays quick


class Operation(NamedTuple):
    """What the words of a problem ask for. Each template names the numbers in the order the program uses them."""

    symbol: str
    apply: Callable[[int, int], int]
    templates: tuple[str, ...]


OPERATIONS = (
    Operation(
        "*",
        lambda a, b: a * b,
        (
            "A hall has {a} rows of {b} seats. How many seats?",
            "One box holds {a} pens. How many are in {b} boxes?",
            "A van drives {a} km a day. How far in {b} days?",
        ),
    ),
    Operation(
        "+",
        lambda a, b: a + b,
        (
            "Ann has {a} coins and gets {b} more. How many now?",
            "One shelf has {a} books, one {b}. How many in all?",
            "A train has {a} riders. {b} get on. How many ride?",
        ),
    ),
    Operation(
        "%",
        lambda a, b: a % b,
        (
            "Fill {a} eggs into crates of {b}. How many are left?",
            "Cut {a} m of rope into parts of {b} m. What remains?",
            "Deal {a} cards to {b} players. How many are left?",
        ),
    ),
)


class ToyTask(NamedTuple):
    """The files of the task."""

    train: Path
    eval: Path
    sft: Path


class Problem(NamedTuple):
    """One word problem; `operation` is an index into OPERATIONS."""

    question: str
    operation: int
    numbers: tuple[int, int]
    answer: str


def make_toy_task(
    directory: str | Path, *, seed: int, train_rows: int, eval_rows: int, sft_rows: int = 4096, calls: bool = False
) -> ToyTask:
    """Write train.parquet, eval.parquet (prompts) and sft.parquet (demonstrations in a `messages` column) to `directory`.

    `calls`: the demonstrations call a tool by name, as agents have them called, in place of writing a program. No problem
    (operation and numbers) occurs twice in or across the files; the same arguments write the same rows.
    """
    for name, rows in (("train_rows", train_rows), ("eval_rows", eval_rows), ("sft_rows", sft_rows)):
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"{name}={rows}; allowed: 1 to {MAX_ROWS}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    problems = _problems(rng)
    task = ToyTask(*(directory / f"{name}.parquet" for name in ToyTask._fields))
    for path, rows in ((task.train, train_rows), (task.eval, eval_rows)):
        _write(path, [_prompt_row(next(problems), index, path.stem) for index in range(rows)])
    _write(
        task.sft,
        [{"messages": demonstration(next(problems), right=rng.random() < RIGHT_SHARE, call=calls)} for _ in range(sft_rows)],
    )
    return task


def demonstration(problem: Problem, *, right: bool, call: bool = False) -> list[dict[str, Any]]:
    """A conversation with one tool call that solves `problem`, or goes through the same motions with the wrong operation.

    `call`: of the tool `TOOL`, by its name.
    """
    shown = OPERATIONS[problem.operation if right else (problem.operation + 1) % len(OPERATIONS)]
    a, b = problem.numbers
    result = str(shown.apply(a, b))
    asks: dict[str, Any] = {"role": "assistant", "content": f"```python\nprint({a}{shown.symbol}{b})\n```"}
    if call:
        named = {"name": TOOL, "arguments": json.dumps({ARGUMENT: f"{a}{shown.symbol}{b}"})}
        asks = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": named}]}
    return [
        {"role": "user", "content": problem.question},
        asks,
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"\\boxed{{{result}}}"},
    ]


def _problems(rng: random.Random) -> Iterator[Problem]:
    """Distinct problems without end."""
    seen: set[tuple[int, int, int]] = set()
    while True:
        index = rng.randrange(len(OPERATIONS))
        operation = OPERATIONS[index]
        a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
        if operation.symbol == "%":
            a, b = max(a, b), min(a, b)  # a remainder that is not just the first number
        template = rng.choice(operation.templates)
        key = (index, a, b)
        if key in seen:
            continue
        seen.add(key)
        yield Problem(template.format(a=a, b=b), index, (a, b), str(operation.apply(a, b)))


def _prompt_row(problem: Problem, index: int, split: str) -> dict[str, Any]:
    return {
        "data_source": "toy",
        "prompt": [{"role": "user", "content": problem.question}],
        "ability": "math",
        "reward_model": {"ground_truth": problem.answer, "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
