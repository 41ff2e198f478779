"""An engine that answers from a script, a letter a token, and what goes with it in an environment."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ctpo_megatron.rollout.calculator import Calculator
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score, ToolRunner
from ctpo_megatron.types import Generation, Prompt, Trajectory
from tests.support.trajectories import ATTEMPT

END = ord("|")
PROMPT = Prompt(4, ({"role": "user", "content": "question"},), "56")
SAMPLING = Sampling(1.0, 5, 9)
CALL = "```python\nprint(7*8)\n```"
WRONG = "```python\nprint(7/0)\n```"


class Letters:
    """A letter is its code; | ends a turn; a tool says {...}."""

    stop_token_ids = [END]  # noqa: RUF012

    def prompt_ids(self, messages):
        return [ord(c) for c in messages[-1]["content"]]

    def tool_ids(self, text, *, earlier=(), end=None):
        assert end == END
        self.earlier = list(earlier)
        return [ord(c) for c in f"{{{text}}}"]

    def decode(self, ids, *, special=False):
        return "".join(chr(i) for i in ids if special or i != END)


@dataclass
class Script:
    """An engine that says its lines in turn, each cut to the tokens allowed; its version grows with every call."""

    lines: list[str]
    seen: list[tuple[str, int, int]] = field(default_factory=list)  # input, tokens allowed, session

    async def generate(
        self, input_ids, done, *, max_new_tokens, temperature, truncation, stop_token_ids, session, recorded, deadline
    ):
        assert stop_token_ids == [END]
        assert recorded is None
        assert deadline is None
        assert done == Generation()
        self.seen.append(("".join(map(chr, input_ids)), max_new_tokens, session))
        ids = [ord(c) for c in self.lines[len(self.seen) - 1]] + [END]
        finish = "stop" if len(ids) <= max_new_tokens else "length"
        ids = ids[:max_new_tokens]
        return Generation(ids, [-0.5] * len(ids), [len(self.seen)] * len(ids), finish)


class Boxes:
    """The real rule for the box, with plain equality."""

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        return Score(float(last_box(outcome.text) == prompt.answer))


CALCULATOR = Calculator()


def play(*lines: str, budget: int = 1000, turns: int = 5, tool: ToolRunner | None = CALCULATOR) -> tuple[Trajectory, Script]:
    script = Script(list(lines))
    environment = ToolEnvironment(script, Letters(), tool, Boxes())
    return asyncio.run(environment.run(environment.begin(PROMPT, ATTEMPT), PROMPT, 9, Sampling(1.0, turns, budget))), script
