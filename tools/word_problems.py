r"""Word problems that a small language model half knows, and worked sums to show it the form of an answer.

    .venv/bin/python tools/word_problems.py DIRECTORY --seed 1

The word problems are of sixteen kinds, of one step or two. Of the demonstrations, three in four are plain sums
("What is 6 * 4 - 5?"), each answered by its steps and a box, and one is a word problem. After them a model knows the form, and
seldom which sum a text asks for: that is left to reinforcement learning.
No question occurs twice, in or across the files; the same arguments write the same rows.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

Numbers = tuple[int, ...]


class Kind(NamedTuple):
    """A kind of word problem: its text, the numbers in it, and the sum that it asks for."""

    name: str
    text: str
    draw: Callable[[random.Random], Numbers]
    sum: str  # of the numbers {0}, {1} and so on, whose steps go from left to right


class Problem(NamedTuple):
    """A question, and the sum that answers it."""

    kind: str
    question: str
    sum: str


class Step(NamedTuple):
    """One operation of a sum."""

    left: int
    symbol: str
    right: int
    result: int


class Files(NamedTuple):
    """What `write` wrote."""

    train: Path
    eval: Path
    sft: Path


def _two(rng: random.Random) -> Numbers:
    return rng.randint(3, 19), rng.randint(2, 9)


def _larger_first(rng: random.Random) -> Numbers:
    small = rng.randint(2, 9)
    return small + rng.randint(2, 12), small


def _factors(rng: random.Random) -> Numbers:
    return rng.randint(2, 12), rng.randint(2, 9)


def _multiple(rng: random.Random) -> Numbers:
    a, b = _factors(rng)
    return a * b, b


def _factors_and_less(rng: random.Random) -> Numbers:
    a, b = rng.randint(2, 6), rng.randint(3, 9)
    return a, b, rng.randint(2, min(9, a * b - 1))


def _factors_and_more(rng: random.Random) -> Numbers:
    return rng.randint(2, 6), rng.randint(3, 9), rng.randint(2, 9)


def _on_and_off(rng: random.Random) -> Numbers:
    a, b = rng.randint(5, 19), rng.randint(2, 9)
    return a, b, rng.randint(2, min(9, a))


def _parts_of_a_multiple(rng: random.Random) -> Numbers:
    size, groups = rng.randint(2, 6), rng.randint(2, 9)
    first = rng.randint(1, size * groups - 1)
    return first, size * groups - first, size


KINDS = (
    Kind("find", "Ann has {0} coins and finds {1} more. How many coins does she have now?", _two, "{0} + {1}"),
    Kind("shelf", "A shelf holds {0} red books and {1} blue books. How many books does it hold?", _two, "{0} + {1}"),
    Kind("older", "Ben is {0} years old. His aunt is {1} years older. How old is his aunt?", _two, "{0} + {1}"),
    Kind("give", "Tom has {0} apples and gives {1} of them away. How many apples are left?", _larger_first, "{0} - {1}"),
    Kind("rope", "A rope is {0} m long. Then {1} m are cut off. How many m remain?", _larger_first, "{0} - {1}"),
    Kind("fewer", "Mia has {0} cards. Leo has {1} fewer. How many cards does Leo have?", _larger_first, "{0} - {1}"),
    Kind("rows", "A hall has {0} rows of {1} seats. How many seats are there?", _factors, "{0} * {1}"),
    Kind("price", "A pen costs {0} dollars. How many dollars do {1} pens cost?", _factors, "{0} * {1}"),
    Kind("days", "A bus runs {0} times a day. How many times does it run in {1} days?", _factors, "{0} * {1}"),
    Kind("share", "{0} cookies are shared equally by {1} children. How many does each child get?", _multiple, "{0} / {1}"),
    Kind("boxes", "{0} eggs are packed into boxes of {1}. How many boxes are filled?", _multiple, "{0} / {1}"),
    Kind("speed", "A car drives {0} km in {1} hours. How many km does it drive in one hour?", _multiple, "{0} / {1}"),
    Kind("eat", "Eva buys {0} bags of {1} sweets and eats {2}. How many sweets are left?", _factors_and_less, "{0} * {1} - {2}"),
    Kind(
        "taxi",
        "A taxi costs {1} dollars per km, and {2} more. What does it cost for {0} km?",
        _factors_and_more,
        "{0} * {1} + {2}",
    ),
    Kind(
        "riders",
        "A train has {0} riders. Then {1} get on and {2} get off. How many riders are left?",
        _on_and_off,
        "{0} + {1} - {2}",
    ),
    Kind(
        "teams", "{0} girls and {1} boys form teams of {2}. How many teams are there?", _parts_of_a_multiple, "({0} + {1}) / {2}"
    ),
)
# the same sums without words
SUMS = tuple(Kind(name, f"What is {name}?", draw, name) for name, draw in {kind.sum: kind.draw for kind in KINDS}.items())
WORD_PROBLEM_EVERY = 4  # demonstrations
MAX_TRIES = 10_000  # draws of numbers for one new question
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def main(
    directory: Annotated[Path, typer.Argument(help="where train.parquet, eval.parquet and sft.parquet go; made if missing")],
    seed: int = 1,
    train_rows: int = 512,
    eval_rows: int = 320,
    sft_rows: int = 480,
) -> None:
    """Write the files."""
    for path in write(directory, seed=seed, train_rows=train_rows, eval_rows=eval_rows, sft_rows=sft_rows):
        print(path)


def write(directory: Path, *, seed: int, train_rows: int, eval_rows: int, sft_rows: int) -> Files:
    """Write prompts to train on, held-out prompts and demonstrations. Every kind has the same share of the prompts, up to one."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    files = Files(*(directory / f"{name}.parquet" for name in Files._fields))
    problems = draw_problems(KINDS, rng)
    for path, rows in ((files.eval, eval_rows), (files.train, train_rows)):
        chosen = list(islice(problems, rows))
        rng.shuffle(chosen)
        _write(path, [_prompt_row(problem, index, path.stem) for index, problem in enumerate(chosen)])
    plain = draw_problems(SUMS, rng)
    shown = [next(plain if row % WORD_PROBLEM_EVERY else problems) for row in range(sft_rows)]
    _write(files.sft, [{"messages": demonstration(problem)} for problem in shown])
    return files


def draw_problems(kinds: Sequence[Kind], rng: random.Random) -> Iterator[Problem]:
    """Distinct problems, kind after kind. Raises ValueError when a kind has no more of them."""
    seen: set[str] = set()
    while True:
        for kind in kinds:
            yield _draw(kind, rng, seen)


def demonstration(problem: Problem) -> list[dict[str, str]]:
    """A conversation in which a problem is worked out."""
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": worked_out(problem.sum)}]


def worked_out(text: str) -> str:
    r"""The steps of a sum and its value in a box: `6 * 4 = 24, 24 - 5 = 19. \boxed{19}`."""
    done = steps(text)
    return f"{', '.join(f'{a} {symbol} {b} = {result}' for a, symbol, b, result in done)}. \\boxed{{{done[-1].result}}}"


def value(text: str) -> int:
    """The value of a sum."""
    return steps(text)[-1].result


def steps(text: str) -> list[Step]:
    """The steps of a sum in the order in which it is written. Raises ValueError for a division that leaves a remainder."""
    first, *rest = text.replace("(", "").replace(")", "").split()
    left, done = int(first), []
    for symbol, right in zip(rest[::2], map(int, rest[1::2]), strict=True):
        if symbol == "/" and left % right:
            raise ValueError(f"{text}: {left} / {right} is not a whole number")
        result = OPERATIONS[symbol](left, right)
        done.append(Step(left, symbol, right, result))
        left = result
    return done


def _draw(kind: Kind, rng: random.Random, seen: set[str]) -> Problem:
    for _ in range(MAX_TRIES):
        numbers = kind.draw(rng)
        question = kind.text.format(*numbers)
        if question not in seen:
            seen.add(question)
            return Problem(kind.name, question, kind.sum.format(*numbers))
    raise ValueError(f"{kind.name!r} has hardly more questions than it gave, and {len(seen)} of all kinds were not enough")


def _prompt_row(problem: Problem, index: int, split: str) -> dict[str, Any]:
    return {
        "data_source": f"word-problems/{problem.kind}",
        "prompt": [{"role": "user", "content": problem.question}],
        "ability": "math",
        "reward_model": {"ground_truth": str(value(problem.sum)), "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


if __name__ == "__main__":
    typer.run(main)
