"""A user's function as a reward: what it is given, what it may give back, and what becomes of it when it goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.config.rewards import FunctionReward as FunctionRewardConfig
from ctpo_megatron.errors import ConfigError, RolloutError
from ctpo_megatron.rollout.protocols import Outcome, Score
from ctpo_megatron.rollout.rewards.function import FunctionReward
from ctpo_megatron.rollout.rewards.opening import check_reward
from ctpo_megatron.types import Prompt, Status

PROMPT = Prompt(0, ({"role": "user", "content": "2 + 2?"},), "4")
OUTCOME = Outcome("x\ny", (("assistant", "x"), ("tool", "é"), ("assistant", "y")), 9, 1, 1, Status.LENGTH)
MODULE = '''
import asyncio, json, os, subprocess, sys, time

def judge(sample):
    """Does what the answer says."""
    print("noise on stdout")
    match sample["text"].partition(" "):
        case ["number", _, said]: return float(said)
        case ["true", *_]: return True
        case ["raise", _, said]: raise KeyError(said)
        case ["exit", *_]: os._exit(3)
        case ["give", _, said]: return json.loads(said)
        case ["read", *_]: return len(subprocess.run(["cat"], capture_output=True).stdout)
        case ["memory", *_]: return len(bytearray(1 << 32))
        case ["child", _, where]:
            child = subprocess.Popen(["sleep", "600"])
            open(where, "w").write(str(child.pid))
            time.sleep(600)
        case _: return {"reward": 1.0, "seen": 1, "given": json.dumps(sample)}

async def waiting(sample):
    if sample["text"] == "wait":
        await asyncio.sleep(600)
    await asyncio.sleep(0)
    return {"reward": 0.5, "pid": os.getpid()}

broken = 5
'''


@pytest.fixture(scope="module", autouse=True)
def _module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("package")
    (folder / "rewards_of_mine.py").write_text(MODULE)
    (folder / "rewards_that_fail.py").write_text("import nothing_like_it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield


def config(function: str = "rewards_of_mine:judge", **settings: Any) -> FunctionRewardConfig:
    return FunctionRewardConfig.model_validate({"function": function, "processes": 1, "timeout_s": 30.0} | settings)


def scores(settings: FunctionRewardConfig, *texts: str) -> list[Score]:
    async def run() -> list[Score]:
        reward = FunctionReward(settings)
        try:
            return [await reward.score(PROMPT, Outcome(text)) for text in texts]
        finally:
            reward.close()

    return asyncio.run(run())


def test_it_is_given_plain_data_and_gives_numbers() -> None:
    async def run() -> Score:
        reward = FunctionReward(config())
        try:
            return await reward.score(PROMPT, OUTCOME)
        finally:
            reward.close()

    score = asyncio.run(run())
    assert (score.reward, score.terms, score.undecided) == (1.0, {"seen": 1.0}, False)
    assert score.given is not None
    assert json.loads(score.given) == {
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "answer": "4",
        "text": "x\ny",
        "turns": [{"role": "assistant", "text": "x"}, {"role": "tool", "text": "é"}, {"role": "assistant", "text": "y"}],
        "status": "length",
        "response_tokens": 9,
        "tool_calls": 1,
        "tool_errors": 1,
    }


def test_what_goes_wrong_is_undecided_with_its_reason_and_the_next_answer_is_judged() -> None:
    """One function for all of it, since its process takes half a second to start; it is started again twice."""
    wrong = {
        "raise x": "it raised KeyError: 'x' (rewards_of_mine.py, line 10)",
        "give null": "it returned None; needed: a finite number",
        'give "5"': "it returned '5'; needed: a finite number",
        "give {}": "it returned 'a dict without `reward`'",
        "number nan": "it returned nan",
        "memory": "it needed more memory than rollout.reward.memory_mb",
        "exit": "its process ended with code 3",
    }
    texts = [text for each in wrong for text in (each, "number 0.25")]
    found = scores(config(memory_mb=2048), *texts, "true", 'give {"reward": 2, "accuracy": 1, "style": 0.5, "note": "x"}')
    for score, (text, words) in zip(found[::2], wrong.items(), strict=False):
        assert (score.reward, score.undecided) == (0.0, True), text
        assert f"rewards_of_mine:judge: {words}" in score.why
    assert [each.reward for each in found[1:14:2]] == [0.25] * 7
    assert found[14].reward == 1.0
    assert (found[15].reward, found[15].accuracy, found[15].terms) == (2.0, 1.0, {"style": 0.5})


def test_a_program_that_it_starts_reads_no_other_answers() -> None:
    async def run() -> list[Score]:
        reward = FunctionReward(config())
        try:
            quick = (reward.score(PROMPT, Outcome("number 0.5")) for _ in range(60))
            await asyncio.gather(*quick)  # from now on it is given several at a time
            return await asyncio.gather(*(reward.score(PROMPT, Outcome(text)) for text in ["read", *["number 0.5"] * 40]))
        finally:
            reward.close()

    reading, *others = asyncio.run(run())
    assert reading.reward == 0.0
    assert not reading.undecided
    assert [each.reward for each in others] == [0.5] * 40


def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    hanging, after = scores(config(timeout_s=0.5), f"child {tmp_path / 'pid'}", "number 1")
    assert (hanging.reward, hanging.undecided, hanging.why) == (0.0, True, "rewards_of_mine:judge: no end within 0.5 s")
    assert after.reward == 1.0
    pid = int((tmp_path / "pid").read_text())
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_one_that_waits_is_ended_in_its_process() -> None:
    before, waiting, after = scores(config("rewards_of_mine:waiting", timeout_s=0.2), "x", "wait", "x")
    assert (waiting.reward, waiting.why) == (0.0, "rewards_of_mine:waiting: no end within 0.2 s")
    assert before.terms == after.terms  # the same process


def test_names_that_never_end_are_not_recorded() -> None:
    texts = [f'give {{"reward": 1, "name_{n}": 1}}' for n in range(51)]
    *good, last = scores(config(), *texts)
    assert not any(each.undecided for each in good)
    assert "more than 50 names" in last.why


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("rewards_that_fail:f", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("rewards_of_mine:none", "AttributeError"),
        ("rewards_of_mine:broken", "is a int; needed: a function"),
    ],
)
def test_one_that_cannot_be_loaded_is_refused_before_a_run(function: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        check_reward(config(function))
    assert f"the reward function {function} did not start" in str(raised.value)
    assert "PYTHONPATH" in str(raised.value)
    with pytest.raises(RolloutError, match=words):
        scores(config(function), "x")


def test_the_function_in_the_documentation_judges_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()
    _, _, rest = page.partition("<!-- tested: a reward of your own -->\n```python\n")
    code, found, _ = rest.partition("```")
    assert found
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    settings = config("my_rewards:last_line")
    check_reward(settings)
    right, wrong, chatty = scores(settings, "So it is\n4", "5", "word " * 300 + "\n4")
    assert (right.reward, right.accuracy, right.terms) == (1.0, 1.0, {"words": 4.0})
    assert wrong.reward == 0.0
    assert (chatty.reward, chatty.accuracy) == (0.9, 1.0)
