"""The terms of a combination that look at how an answer was given, not at whether it is right."""

from __future__ import annotations

import asyncio

import regex

from ctpo_megatron.config.rewards import FormatTerm, LengthTerm, ToolUseTerm
from ctpo_megatron.rollout.protocols import Outcome, Score
from ctpo_megatron.types import Prompt


class Format:
    """1 where the pattern is found in what the assistant wrote, else 0; undecided where the search comes to no end in time."""

    def __init__(self, config: FormatTerm) -> None:
        self._timeout_s = config.timeout_s
        self._pattern = regex.compile(config.pattern, regex.DOTALL)

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Implement `Reward.score`."""
        # in a thread and with a clock: some patterns take for ever on some texts, and the model chooses the text
        try:
            found = await asyncio.to_thread(self._search, outcome.text)
        except TimeoutError:
            return Score(0.0, undecided=True, why=f"the search for the pattern: no end within {self._timeout_s:g} s")
        return Score(float(found))

    def _search(self, text: str) -> bool:
        return self._pattern.search(text, timeout=self._timeout_s) is not None


class Length:
    """The soft over-long punishment of DAPO (arXiv 2503.14476, equation 13), on all tokens after the prompt."""

    def __init__(self, config: LengthTerm) -> None:
        self._max_tokens, self._buffer = config.max_tokens, config.buffer

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Implement `Reward.score`."""
        over = outcome.response_tokens - (self._max_tokens - self._buffer)
        return Score(-min(max(over / self._buffer, 0.0), 1.0))


class ToolUse:
    """1 where the tool was called as often as wanted, less for calls that failed; else 0."""

    def __init__(self, config: ToolUseTerm) -> None:
        self._config = config

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """Implement `Reward.score`."""
        config, calls = self._config, outcome.tool_calls
        if calls < config.min_calls or (config.max_calls is not None and calls > config.max_calls):
            return Score(0.0)
        return Score(1.0 - config.failed * outcome.tool_errors / max(calls, 1))
