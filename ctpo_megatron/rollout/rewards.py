r"""Rewards that can be verified: the model's last \boxed{} against the known answer."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from decimal import Decimal, InvalidOperation

from ctpo_megatron.config.rewards import MathReward as MathRewardConfig
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.grading.boxes import last_box
from ctpo_megatron.rollout.protocols import Score
from ctpo_megatron.types import Prompt

JUDGE = (sys.executable, "-m", "ctpo_megatron.rollout.judge")
START_TIMEOUT_S = 120.0
MAX_ANSWER_CHARS = 1000  # a longer one is nothing that a known answer could equal
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?")
_LOOSE_SPACE = re.compile(r" (?=[-+*/=<>^{}()\[\]])|(?<=[-+*/=<>^{}()\[\]]) ")


class MathReward:
    """1.0 where the last box equals the prompt's answer, else 0.0. Plain pairs are decided here, all others by `rollout.judge`.

    A comparison that takes longer than `timeout_s`, or brings its process down, is undecided: its reward is 0. Close it to end
    its processes.
    """

    def __init__(self, config: MathRewardConfig, *, judges: int = 2) -> None:
        self._timeout_s = config.timeout_s
        self._judges = [_Judge() for _ in range(judges)]
        self._idle: asyncio.Queue[_Judge] = asyncio.Queue()
        for judge in self._judges:
            self._idle.put_nowait(judge)

    async def score(self, prompt: Prompt, text: str) -> Score:
        """Returns the reward of the assistant's `text`."""
        given = last_box(text)
        if given is None or len(given) > MAX_ANSWER_CHARS:
            return Score(0.0)
        verdict = await self.same(last_box(prompt.answer) or prompt.answer, given)
        return Score(float(verdict or 0.0), undecided=verdict is None, given=given)

    async def same(self, one: str, other: str) -> bool | None:
        """Returns whether two answers, without their boxes, are equal; None where that is undecided."""
        verdict = quick_verdict(one, other)
        return await self._ask(one, other) if verdict is None else verdict

    def close(self) -> None:
        """End the judges' processes."""
        for judge in self._judges:
            judge.close()

    async def _ask(self, answer: str, given: str) -> bool | None:
        judge = await self._idle.get()
        try:
            return await judge.equal(answer, given, self._timeout_s)
        except _Undecided:
            return None
        finally:
            self._idle.put_nowait(judge)


def quick_verdict(answer: str, given: str) -> bool | None:
    """Equality where it is plain: equal text, equal numbers, different whole numbers. None where it takes mathematics."""
    left, right = _normalized(answer), _normalized(given)
    if left == right:
        return bool(left)
    if not left or not right:
        return False
    ours, theirs = _decimal(left), _decimal(right)
    if ours is None or theirs is None:
        return None
    if ours == theirs:
        return True
    return False if all(number == number.to_integral_value() for number in (ours, theirs)) else None


class _Undecided(Exception):
    """A comparison came to no end."""


class _Judge:
    """Compares answers in one process, which is started when first asked and again after it had to be ended."""

    def __init__(self) -> None:
        self._running: _JudgeProcess | None = None

    async def equal(self, answer: str, given: str, timeout_s: float) -> bool:
        """Returns its verdict. Raises _Undecided after `timeout_s` or where the process ended, RolloutError where none starts."""
        line = b""
        try:
            running = self._running
            if running is None:
                running = self._running = _JudgeProcess()
                await running.start()
            request = json.dumps({"answer": answer, "given": given, "timeout_s": timeout_s})
            line = await running.ask(request.encode() + b"\n", timeout_s)
        finally:
            if not line:  # also when cancelled: a late verdict must not be read as the next one's
                self.close()
        if not line:
            raise _Undecided
        return bool(json.loads(line))

    def close(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            self._running.close()
            self._running = None


class _JudgeProcess:
    """One process of `ctpo_megatron.rollout.judge`."""

    def __init__(self) -> None:
        # no asyncio subprocess: in Python 3.11 one that is cancelled while it starts waits forever
        self._process = subprocess.Popen(JUDGE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process that was started with pipes has none")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._verdicts = asyncio.StreamReader()
        self._pipe: asyncio.ReadTransport | None = None

    async def start(self) -> None:
        """Wait until it takes requests. Raises RolloutError where it does not in time."""
        protocol = asyncio.StreamReaderProtocol(self._verdicts)
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, self._stdout)
        if await self.ask(b"", START_TIMEOUT_S) != b"ready\n":
            raise RolloutError(
                f"the process that compares answers did not start within {START_TIMEOUT_S:g} s "
                f"(exit code {self._process.poll()}); see why with: {' '.join(JUDGE)}"
            )

    async def ask(self, request: bytes, timeout_s: float) -> bytes:
        """Send `request`; returns the next line, empty where there is none in time."""
        try:
            self._stdin.write(request)
            async with asyncio.timeout(timeout_s):
                return await self._verdicts.readline()
        except (TimeoutError, BrokenPipeError):
            return b""

    def close(self) -> None:
        """End it."""
        if self._pipe is not None:
            self._pipe.close()
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()


def _normalized(text: str) -> str:
    """`text` with single spaces, those around operators and brackets left out, without a pair of math delimiters around it.

    A space may separate the items of a list or the parts of a mixed number, so it is never left out between other characters.
    """
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2:
        text = text[1:-1].strip()
    if " " in text or not text.isprintable():
        text = _LOOSE_SPACE.sub("", " ".join(text.split()))
    return text


def _decimal(text: str) -> Decimal | None:
    if "," in text and _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None
