"""What simulated attempts say: how many tokens in which turns, and what that earns.

All of it is drawn by the names of things (seed, prompt, attempt) and never from a stream, so it does not depend on the order in
which anything happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from ctpo_megatron.errors import ConfigError
from ctpo_megatron.simulation.lines import read_lines
from ctpo_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class Said:
    """One turn: tokens of the model, and of the tool that answers it; None: it asks for none."""

    tokens: int
    tool: int | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """One attempt."""

    turns: tuple[Said, ...]
    reward: float


class Workload(Protocol):
    """Attempts at a number of prompts."""

    def prompts(self) -> list[Prompt]:
        """Returns the prompts, each of whose one message says how many `tokens` it has."""
        ...

    def script(self, prompt: int, group: int, attempt: int) -> Script:
        """Returns attempt `attempt` of group `group` at prompt `prompt`: the same whenever it is asked for."""
        ...


def prompt_of(index: int, tokens: int) -> Prompt:
    """Returns a prompt of so many tokens."""
    return Prompt(index, ({"role": "user", "content": "", "tokens": tokens},), "")


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Responses of log-normal length: `mean` tokens, `sigma` the standard deviation of their logarithm.

    `shared`: the share of its variance that lies between prompts. `calls`: tool calls of each attempt, between equal turns; each
    adds `tool_tokens`. A prompt's share of right answers is uniform.
    """

    mean: float
    sigma: float
    prompt_tokens: int
    calls: int = 0
    tool_tokens: int = 64
    shared: float = 0.5
    seed: int = 0
    count: int = 4096  # prompts

    def prompts(self) -> list[Prompt]:
        """Returns the prompts, all equally long."""
        return [prompt_of(index, self.prompt_tokens) for index in range(self.count)]

    def script(self, prompt: int, group: int, attempt: int) -> Script:
        """Returns an attempt."""
        of_prompt, own = Random(f"{self.seed}/{prompt}"), Random(f"{self.seed}/{group}/{attempt}")
        level, share = of_prompt.gauss(0, 1), of_prompt.random()
        normal = math.sqrt(self.shared) * level + math.sqrt(1 - self.shared) * own.gauss(0, 1)
        length = math.exp(math.log(self.mean) - self.sigma**2 / 2 + self.sigma * normal)
        each = max(1, round(length / (self.calls + 1)))
        turns = [Said(each, self.tool_tokens)] * self.calls + [Said(each)]
        return Script(tuple(turns), float(own.random() < share))


class Recorded:
    """The trajectories of a run: each recorded group is a prompt, whose attempts are drawn among the recorded ones."""

    def __init__(self, groups: Sequence[tuple[int, Sequence[Script]]], seed: int = 0) -> None:
        self._groups, self._seed = groups, seed

    def prompts(self) -> list[Prompt]:
        """Returns the prompts."""
        return [prompt_of(index, tokens) for index, (tokens, _) in enumerate(self._groups)]

    def script(self, prompt: int, group: int, attempt: int) -> Script:
        """Returns a recorded attempt: all of a group once where no more are asked for, in an order drawn for this group."""
        recorded = self._groups[prompt][1]
        order = list(range(len(recorded)))
        Random(f"{self._seed}/{group}").shuffle(order)
        return recorded[order[attempt % len(order)]]


def read_recorded(run_dir: Path, prompt_tokens: int, seed: int = 0) -> Recorded:
    """Returns the attempts of the run in `run_dir`: of its trajectories, else of its ledger, which knows no turns and no prompts.

    `prompt_tokens`: of a prompt in a ledger. Raises ConfigError where neither is there.
    """
    files = sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    groups = list(_of_trajectories(files)) or list(_of_ledger(run_dir / "ledger.jsonl", prompt_tokens))
    if not groups:
        raise ConfigError(
            f"{run_dir} has neither rollouts/step_*.jsonl with trajectories nor a ledger.jsonl with groups; give the directory "
            "of a run, or mean=TOKENS."
        )
    return Recorded(groups, seed)


def _of_trajectories(files: Sequence[Path]) -> Iterator[tuple[int, list[Script]]]:
    found: dict[tuple[str, str], tuple[int, list[Script]]] = {}
    for path in files:
        for line in read_lines(path):
            _, scripts = found.setdefault((path.name, line["group"]), (len(line["prompt_ids"]), []))
            scripts.append(Script(tuple(_turns(line["turns"])), float(line["reward"])))
    yield from found.values()


def _turns(turns: list[dict[str, Any]]) -> Iterator[Said]:
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        after = turns[number + 1] if number + 1 < len(turns) else None
        yield Said(len(turn["token_ids"]), None if after is None else len(after["token_ids"]))


def _of_ledger(path: Path, prompt_tokens: int) -> Iterator[tuple[int, list[Script]]]:
    for line in read_lines(path):
        made = [each for each in line.get("attempts", []) if each["tokens"] and each["reward"] is not None]
        if made:
            yield prompt_tokens, [Script((Said(each["tokens"]),), float(each["reward"])) for each in made]
