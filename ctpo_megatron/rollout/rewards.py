r"""Rewards that can be verified: the model's last \boxed{} against the known answer."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from decimal import Decimal, InvalidOperation

from ctpo_megatron.config.rollout import MathReward as MathRewardConfig
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.types import Prompt

BOX = "\\boxed{"
JUDGE = (sys.executable, "-m", "ctpo_megatron.rollout.judge")
START_TIMEOUT_S = 120.0
MAX_ANSWER_CHARS = 1000  # a longer one is nothing that a known answer could equal
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")


class MathReward:
    """1.0 where the last box equals the prompt's answer, else 0.0. Most pairs are decided here; math-verify decides the rest.

    `undecided` counts comparisons that took longer than `timeout_s` or brought their process down; their reward is 0. Close it
    to end its processes.
    """

    def __init__(self, config: MathRewardConfig, *, judges: int = 2) -> None:
        self.undecided = 0
        self._timeout_s = config.timeout_s
        self._judges = [_Judge() for _ in range(judges)]
        self._idle: asyncio.Queue[_Judge] = asyncio.Queue()
        for judge in self._judges:
            self._idle.put_nowait(judge)

    async def score(self, prompt: Prompt, text: str) -> float:
        """Reward of the assistant's `text`."""
        given = last_box(text)
        if given is None or len(given) > MAX_ANSWER_CHARS:
            return 0.0
        answer = last_box(prompt.answer) or prompt.answer
        verdict = quick_verdict(answer, given)
        if verdict is None:
            verdict = await self._ask(answer, given)
        return float(verdict)

    def close(self) -> None:
        """End the judges' processes."""
        for judge in self._judges:
            judge.close()

    async def _ask(self, answer: str, given: str) -> bool:
        judge = await self._idle.get()
        try:
            return await judge.equal(answer, given, self._timeout_s)
        except _Undecided:
            self.undecided += 1
            return False
        finally:
            self._idle.put_nowait(judge)


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces balance, None without one."""
    start = text.rfind(BOX)
    while start >= 0:
        depth, begin = 1, start + len(BOX)
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin:place].strip()
        start = text.rfind(BOX, 0, start)
    return None


def quick_verdict(answer: str, given: str) -> bool | None:
    """Equality where it is plain: equal text, equal numbers, different whole numbers. None where it takes mathematics."""
    left, right = _normalized(answer), _normalized(given)
    if left == right:
        return True
    if not right:
        return False
    numbers = _decimal(left), _decimal(right)
    if None in numbers:
        return None
    if numbers[0] == numbers[1]:
        return True
    return False if all(number == number.to_integral_value() for number in numbers) else None


class _Undecided(Exception):
    """A comparison came to no end."""


class _Judge:
    """One process of `ctpo_megatron.rollout.judge`, started when first asked and again after it had to be ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: asyncio.StreamReader | None = None
        self._pipe: asyncio.ReadTransport | None = None

    async def equal(self, answer: str, given: str, timeout_s: float) -> bool:
        """Its verdict. Raises _Undecided after `timeout_s` or where the process ended, RolloutError where it does not start."""
        line = b""
        try:
            if self._process is None:
                await self._start()
            request = json.dumps({"answer": answer, "given": given, "timeout_s": timeout_s})
            line = await self._ask(request.encode() + b"\n", timeout_s)
        finally:
            if not line:  # also when cancelled: a late verdict must not be read as the next one's
                self.close()
        if not line:
            raise _Undecided
        return json.loads(line)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    async def _start(self) -> None:
        # no asyncio subprocess: in Python 3.11 one that is cancelled while it starts waits forever
        self._process = subprocess.Popen(JUDGE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._verdicts = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(self._verdicts)
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, self._process.stdout)
        if await self._ask(b"", START_TIMEOUT_S) != b"ready\n":
            raise RolloutError(
                f"the process that compares answers did not start within {START_TIMEOUT_S:g} s "
                f"(exit code {self._process.poll()}); see why with: {' '.join(JUDGE)}"
            )

    async def _ask(self, request: bytes, timeout_s: float) -> bytes:
        """Its next line, empty where there is none in time."""
        try:
            self._process.stdin.write(request)
            async with asyncio.timeout(timeout_s):
                return await self._verdicts.readline()
        except (TimeoutError, BrokenPipeError):
            return b""


def _normalized(text: str) -> str:
    """`text` without white space, math delimiters, and commas between groups of digits."""
    text = re.sub(r"\s+|\\[,;!]|\$", "", text)
    return re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)


def _decimal(text: str) -> Decimal | None:
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None
