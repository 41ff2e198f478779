"""The example of a user's environment, as its page and its file describe it."""

from __future__ import annotations

import asyncio
import random
from itertools import product

from ctpo_megatron.config.load import load_config
from ctpo_megatron.jobs.worlds import worlds_of
from ctpo_megatron.types import Parsed, Prompt
from examples.guess import NUMBERS, Guess, demonstrations
from tests.support.examples import EXAMPLES


async def played(number: int, guesses: list[str]) -> tuple[float, list[str | None]]:
    world, said = Guess(), []
    await world.reset(Prompt(0, (), str(number)))
    for guess in guesses:
        result = await world.step(Parsed(guess))
        if result.done:
            return result.reward or 0.0, said
        said.append(result.text)
    raise AssertionError("the game did not end")


def test_halving_finds_every_number_and_no_fixed_guesses_do() -> None:
    async def halved(number: int) -> float:
        first = 4
        second = first + (2 if number > first else -2)
        third = second + (1 if number > second else -1)
        return (await played(number, [str(first), str(second), str(third)]))[0]

    assert [asyncio.run(halved(number)) for number in NUMBERS] == [1.0] * 7
    wins = [
        sum(asyncio.run(played(n, [str(g) for g in guesses]))[0] for n in NUMBERS) for guesses in product((1, 4, 7), repeat=3)
    ]
    assert max(wins) == 3


def test_what_is_no_guess_ends_the_game() -> None:
    for words in ("", "x", "12", "²", "4 "):
        assert asyncio.run(played(4, [words])) == (0.0, [])
    assert asyncio.run(played(4, ["1", "7", "4"])) == (1.0, ["higher", "lower"])


def test_its_configuration_and_its_demonstrations() -> None:
    config = load_config(EXAMPLES / "guess.yaml", [])
    worlds = worlds_of(config.rollout.environment)
    assert worlds is not None
    assert isinstance(worlds(), Guess)
    rows = demonstrations(random.Random(1), 300)
    assert {len(row["messages"]) for row in rows} == {2, 4, 6}
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
