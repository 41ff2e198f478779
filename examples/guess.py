"""An environment of one's own: a game of three guesses, its data, and a cold start that has never heard of a strategy.

    .venv/bin/python examples/guess.py runs/guess/data                        # prompts, and games played at random
    .venv/bin/python tools/make_toy_model.py runs/guess/base
    .venv/bin/ctpo sft examples/guess_sft.yaml
    PYTHONPATH=. .venv/bin/ctpo train examples/guess.yaml

The world thinks of a number from 1 to 7 (`reward_model.ground_truth` of the prompt), and says whether it is higher or lower than
the model's guess. Whoever halves what is left finds each number with three guesses; the games of the cold start guess at random.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

from ctpo_megatron.rollout.worlds.protocols import StepResult
from ctpo_megatron.types import Parsed, Prompt

NUMBERS = range(1, 8)
GUESSES = 3


class Guess:
    """One game."""

    tools = ()  # its turns are text
    replayable = True  # the same guesses get the same answers

    def __init__(self, guesses: int = GUESSES) -> None:
        self._left = guesses
        self._number = 0

    async def reset(self, prompt: Prompt) -> None:
        """Think of a number; there is nothing to say before the first guess."""
        self._number = int(prompt.answer)

    async def step(self, turn: Parsed) -> StepResult:
        """Answer a guess."""
        self._left -= 1
        if not (turn.content.isascii() and turn.content.isdigit() and len(turn.content) == 1):
            return StepResult(reward=0.0, done=True)
        guess = int(turn.content)
        if guess == self._number or self._left == 0:
            return StepResult(reward=float(guess == self._number), done=True)
        return StepResult("higher" if self._number > guess else "lower")

    async def close(self) -> None:
        """It holds nothing."""


def question(game: int) -> dict[str, str]:
    """The prompt of a game; its number makes each prompt another one."""
    return {"role": "user", "content": f"Game {game}: 1 to 7?"}


def prompts(rng: random.Random, rows: int, first: int) -> list[dict[str, Any]]:
    """Games to be played."""
    return [
        {"prompt": [question(first + row)], "reward_model": {"ground_truth": str(rng.choice(NUMBERS))}} for row in range(rows)
    ]


def demonstrations(rng: random.Random, rows: int) -> list[dict[str, Any]]:
    """Games up to one of their guesses, which is any number: they teach how the game is played, not how it is won."""
    found = []
    for game in range(rows):
        number, messages = rng.choice(NUMBERS), [question(game)]
        for _ in range(rng.randrange(GUESSES)):
            guess = rng.choice([each for each in NUMBERS if each != number])
            messages.append({"role": "assistant", "content": str(guess)})
            messages.append({"role": "user", "content": "higher" if number > guess else "lower"})
        messages.append({"role": "assistant", "content": str(rng.choice(NUMBERS))})
        found.append({"messages": messages})
    return found


def write(directory: Path, seed: int = 1, rows: int = 4096) -> None:
    """Write train.parquet, eval.parquet and sft.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    tables = {
        "train": prompts(rng, rows, 10_000),
        "eval": prompts(rng, 128, 90_000),
        "sft": demonstrations(rng, rows),
    }
    for name, table in tables.items():
        pq.write_table(pa.Table.from_pylist(table), directory / f"{name}.parquet")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
