"""A language model as a judge, over a real HTTP server that plays it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from ctpo_megatron.config.rewards import JudgeReward as JudgeRewardConfig
from ctpo_megatron.config.rollout import RolloutConfig
from ctpo_megatron.errors import ConfigError, RolloutError
from ctpo_megatron.rollout import rollouter
from ctpo_megatron.rollout.environment import ToolEnvironment
from ctpo_megatron.rollout.protocols import Outcome, Sampling, Score
from ctpo_megatron.rollout.rewards import chat_server, judge_model
from ctpo_megatron.rollout.rewards.judge_model import JudgeReward
from ctpo_megatron.rollout.rewards.verdict import Nonsense, last_number, last_object
from ctpo_megatron.types import Generation, GroupId, Prompt, TrajectoryGroup

PROMPT = Prompt(0, ({"role": "user", "content": "Who wrote $5?"},), "Ann")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_model, "pause", lambda number, wanted: 0.0)


def said(text: str | None, tokens: int = 100, finish: str = "stop") -> web.Response:
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    return web.json_response({"id": "1", "choices": choices, "usage": {"total_tokens": tokens}})


class Played:
    """A server that gives `answers`, one after the other, the last one for ever."""

    def __init__(self, *answers: Callable[[], Any]) -> None:
        self.answers, self.bodies, self.keys = answers, list[dict[str, Any]](), list[str | None]()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        answer = self.answers[min(len(self.bodies), len(self.answers)) - 1]()
        return await answer if asyncio.iscoroutine(answer) else answer


@asynccontextmanager
async def judged_by(server: Played, tmp_path: Path, **settings: Any) -> AsyncIterator[JudgeReward]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        config = {"url": f"http://{host}:{port}/v1/", "model": "m", "budget_calls": None} | settings
        async with JudgeReward(JudgeRewardConfig.model_validate(config), tmp_path / "judge" / "answer.jsonl") as reward:
            yield reward
    finally:
        await runner.cleanup()


def scores(server: Played, tmp_path: Path, *texts: str, **settings: Any) -> list[Score]:
    async def run() -> list[Score]:
        async with judged_by(server, tmp_path, **settings) as reward:
            return [await reward.score(PROMPT, Outcome(text)) for text in texts]

    return asyncio.run(run())


def test_a_judge_is_asked_once_for_each_answer_also_over_a_restart(tmp_path: Path) -> None:
    server = Played(lambda: said("Right.\nScore: **1**"), lambda: said("0"))
    first = scores(server, tmp_path, r"x \boxed{Ann}", "Bob", r"x \boxed{Ann}")
    assert [each.reward for each in first] == [1.0, 0.0, 1.0]
    assert [each.terms for each in first] == [
        {"judge_tokens": 100.0, "judge_cached": 0.0},
        {"judge_tokens": 100.0, "judge_cached": 0.0},
        {"judge_tokens": 0.0, "judge_cached": 1.0},
    ]
    assert (first[0].given, first[1].given) == ("Ann", None)
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    asked = body["messages"][-1]["content"]
    assert "Who wrote $5?" in asked
    assert "Reference answer:\nAnn" in asked
    assert r"x \boxed{Ann}" in asked
    assert server.keys == [None, None]
    again = scores(server, tmp_path, "Bob", "Carl")
    assert len(server.bodies) == 3
    assert [each.reward for each in again] == [0.0, 0.0]
    with (tmp_path / "judge" / "answer.jsonl").open("a") as file:
        file.write('{"key": "half')  # of a driver that was killed
    scores(server, tmp_path, "Bob", "Carl")
    assert len(server.bodies) == 3


def test_the_key_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-key-of-mine\n")
    server = Played(lambda: web.Response(status=400, text="your key a-key-of-mine has no such model"))
    (score,) = scores(server, tmp_path, "x", key_file=str(tmp_path / "key"))
    assert server.keys == ["Bearer a-key-of-mine"]
    assert score.undecided
    assert score.why == "the judge does not take the request: status 400: your key *** has no such model"
    assert "a-key-of-mine" not in (tmp_path / "judge" / "answer.jsonl").read_text()
    (tmp_path / "key").write_text("a-key-of-mine another")
    with pytest.raises(ConfigError, match=r"key_file=.* one key in it") as raised:
        scores(server, tmp_path, "x", key_file=str(tmp_path / "key"))
    assert "a-key-of-mine" not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        scores(server, tmp_path, "x", key_file=str(tmp_path / "none"))


async def never() -> web.Response:
    await asyncio.sleep(3600)
    raise AssertionError


TROUBLES: list[Callable[[], Any]] = [
    lambda: web.Response(status=503, text="away"),
    lambda: web.Response(status=429, headers={"Retry-After": "1"}),
    lambda: web.Response(text="<html>", content_type="text/html"),
    lambda: web.json_response({"choices": []}),
    lambda: web.json_response({"choices": 5}),
]


def test_a_server_in_trouble_is_asked_again(tmp_path: Path) -> None:
    server = Played(*TROUBLES, lambda: said("1"))
    (score,) = scores(server, tmp_path, "x", retries=5)
    assert (score.reward, len(server.bodies)) == (1.0, 6)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(TROUBLES[0], "in 3 requests: status 503: away"), (never, "in 3 requests: no answer within 0.05 s")],
)
def test_a_judge_that_is_down_or_slow_looked_at_nothing(answer: Callable[[], Any], words: str, tmp_path: Path) -> None:
    server = Played(answer)
    with pytest.raises(RolloutError, match=words):
        scores(server, tmp_path, "x", retries=2, timeout_s=0.05)
    assert len(server.bodies) == 3


def test_nobody_at_the_port_is_a_judge_that_is_down(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="in 2 requests: ClientConnectorError"):
        scores(Played(), tmp_path, "x", retries=1, url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_a_judge_that_was_never_right_ends_the_run_and_later_it_may_pass(status: int, tmp_path: Path) -> None:
    def wrong() -> web.Response:
        return web.Response(status=status, text="no", headers={"Location": "http://127.0.0.1:9/"})

    with pytest.raises(ConfigError, match=f"answers status {status}: no. Look at rollout.reward's url, model and key_file"):
        scores(Played(wrong), tmp_path, "x")
    server = Played(lambda: said("1"), wrong, lambda: said("0"))
    assert [each.reward for each in scores(server, tmp_path, "y", "z")] == [1.0, 0.0]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("banana", "its last line is no number: 'banana'"),
        ("1\nI am sure", "its last line is no number"),
        ("7", "its score 7 is not in 0 to 1"),
        (None, "its last line is no number: ''"),
    ],
)
def test_nonsense_is_undecided_and_counted_as_paid(reply: str | None, words: str, tmp_path: Path) -> None:
    (score,) = scores(Played(lambda: said(reply)), tmp_path, "x")
    assert (score.reward, score.undecided) == (0.0, True)
    assert words in score.why
    assert score.terms["judge_tokens"] == 100.0


def test_a_reply_that_its_limit_cut_says_so(tmp_path: Path) -> None:
    (score,) = scores(Played(lambda: said("I think", finish="length")), tmp_path, "x")
    assert "(rollout.reward.max_tokens cut it)" in score.why


def test_a_budget_of_calls_holds_exactly_over_restarts_with_many_at_once(tmp_path: Path) -> None:
    server = Played(lambda: web.Response(status=503), lambda: said("1"))
    assert [each.reward for each in scores(server, tmp_path, "a", budget_calls=4)] == [1.0]

    async def many() -> list[Score | BaseException]:
        async with judged_by(server, tmp_path, budget_calls=4) as reward:
            asked = [reward.score(PROMPT, Outcome(str(n))) for n in range(9)]
            return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(many())
    refused = [each for each in found if isinstance(each, ConfigError)]
    assert (len(server.bodies), len(refused)) == (4, 7)
    assert "the judge's budget is used up: rollout.reward.budget_calls=4, used 4" in str(refused[0])
    zero = scores(server, tmp_path, "a", "new", budget_calls=4, beyond="zero")
    assert [each.reward for each in zero] == [1.0, 0.0]  # what was judged before costs nothing
    assert (zero[1].undecided, zero[1].terms, len(server.bodies)) == (False, {"judge_skipped": 1.0}, 4)


def test_a_budget_of_tokens_ends_at_the_first_request_beyond_it(tmp_path: Path) -> None:
    server = Played(lambda: said("1", tokens=60))
    with pytest.raises(ConfigError, match="budget_tokens=100, used 120"):
        scores(server, tmp_path, "a", "b", "c", budget_tokens=100)
    assert len(server.bodies) == 2


def test_equal_answers_at_the_same_time_are_not_all_sent(tmp_path: Path) -> None:
    server = Played(lambda: said("1"))

    async def both() -> Sequence[Score]:
        async with judged_by(server, tmp_path, concurrency=1) as reward:
            return await asyncio.gather(*(reward.score(PROMPT, Outcome("x")) for _ in range(5)))

    assert [each.reward for each in asyncio.run(both())] == [1.0] * 5
    assert len(server.bodies) == 1


def test_scores_are_scaled_and_other_numbers_recorded(tmp_path: Path) -> None:
    reply = 'I see {"score": 1} but no: {"score": 4, "style": 0.5, "note": "x", "true": true, "a b": 1}'
    settings = {"verdict": "json", "lowest": 1, "highest": 5, "seen_after": "</think>", "max_response_chars": 30, "system": "s"}
    server = Played(lambda: said(reply))
    scored, silent = scores(server, tmp_path, "secret </think> " + "long " * 20, "no end of thinking", **settings)
    assert scored.reward == 0.75
    assert scored.terms == {"style": 0.5, "true": 1.0, "judge_tokens": 100.0, "judge_cached": 0.0}
    asked = server.bodies[0]["messages"]
    assert asked[0] == {"role": "system", "content": "s"}
    assert "secret" not in asked[1]["content"]
    assert "long" * 9 not in asked[1]["content"].replace(" ", "")
    assert (silent.reward, silent.undecided, len(server.bodies)) == (0.0, False, 1)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("x\n\n 0.5 \n", 0.5), ("Final score: 3", 3), ("**Score:** 4.", 4), ("-1.5", -1.5), ("`.5`", 0.5), ("+2", 2)],
)
def test_the_last_line_is_the_score(text: str, number: float) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize("text", ["", "one", "5/10", "5 out of 10", "1 2", "nan", "inf", "1e5", "Score 1 of: none"])
def test_other_last_lines_are_none(text: str) -> None:
    with pytest.raises(Nonsense):
        last_number(text)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"score": "1"}', '{"score": NaN}', '{"score": null}', '{"score": 1', "{" * 5000, "[1]"]
)
def test_objects_without_a_score(text: str) -> None:
    with pytest.raises(Nonsense):
        last_object(text)


def test_pauses_grow_are_bounded_and_heed_the_server() -> None:
    assert 0.25 <= chat_server.pause(1, None) <= 0.5
    assert chat_server.pause(50, None) <= chat_server.LONGEST_PAUSE_S
    assert chat_server.pause(1, 7.0) == 7.0
    assert chat_server.pause(1, 1e9) == chat_server.LONGEST_PAUSE_S


def test_a_file_that_is_none_of_replies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(ConfigError, match=r"other.jsonl, line 1: no reply of a judge"):
        scores(Played(), tmp_path, replies=str(tmp_path / "other.jsonl"))


class Letters:
    """A letter is its code."""

    stop_token_ids = (0,)

    def prompt_ids(self, messages: Any) -> list[int]:
        return [1]

    def decode(self, ids: Any, *, special: bool = False) -> str:
        return "".join(chr(token) for token in ids if token)


class Sampled:
    """Says another letter each time."""

    def __init__(self) -> None:
        self.letters = 0

    async def generate(self, input_ids: list[int], done: Generation, **options: Any) -> Generation:
        self.letters += 1
        return Generation([96 + self.letters, 0], [0.0, 0.0], [0, 0], "stop")


@pytest.mark.parametrize(("troubles", "ended"), [(4, "well"), (99, "failed")])
def test_attempts_outlive_a_judge_that_is_down_for_a_while_and_are_not_sampled_again(
    troubles: int, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests for each of two tries of each of two attempts."""
    monkeypatch.setattr(rollouter, "RETRY_PAUSE_S", 0.0)
    server = Played(*[TROUBLES[0]] * troubles, lambda: said("banana"), lambda: said("1"))
    sampled = Sampled()

    async def play() -> TrajectoryGroup:
        async with judged_by(server, tmp_path, retries=1) as reward:
            environment = ToolEnvironment(cast(Any, sampled), cast(Any, Letters()), None, reward)
            played = rollouter.Rollouter(environment, RolloutConfig(retries=1))
            return await played.group(PROMPT, GroupId(0), size=2, sampling=Sampling(1.0, 1, 9), keep_failed=True)

    group = asyncio.run(play())
    assert sampled.letters == 2
    if ended == "well":
        assert sorted((each.reward, each.undecided, each.why[:12]) for each in group.trajectories) == [
            (0.0, True, "the judge's "),  # its nonsense is a verdict of a kind, and is not asked for again
            (1.0, False, ""),
        ]
    else:
        assert not group.trajectories  # nothing is trained on that nobody has looked at
        reasons = [each.reason for each in group.failed if not each.aborted]
        assert reasons
        assert set(reasons) == {"RolloutError: no verdict from the judge in 2 requests: status 503: away"}
