"""Teachers on servers: what they are asked, what becomes of the answers, and of those that do not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from ctpo_megatron.config.distillation import ServedTeacher
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.teachers import AskedTeachers, TeacherClient, in_turn, read_key
from ctpo_megatron.engine.teachers import serving as serving_in
from ctpo_megatron.errors import EngineError, EngineRefused, TeacherFailed
from ctpo_megatron.types import AttemptId, Branch, GroupId, Prompt, Status, Trajectory, TrajectoryGroup, Turn

Answer = Callable[[dict[str, Any]], Any]  # JSON, or a status
NAME = GroupId(3)


def said(token: int, place: int) -> float:
    """The log-prob that a stand-in gives to a token at a place of its sequence."""
    return -0.5 * token - 0.01 * place


def honest(body: dict[str, Any]) -> Any:
    """As SGLang answers: from `logprob_start_len` on, nothing of the first of these."""
    ids, begin = body["input_ids"], body["logprob_start_len"]
    rows = [[said(token, place), token, None] for place, token in enumerate(ids)][begin:]
    rows[0][0] = None
    return {"meta_info": {"input_token_logprobs": rows}}


@dataclass
class Server:
    """A stand-in on the loop of the test; answers in turn as `answers` say, and then honestly."""

    answers: list[Answer] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    url: str = ""
    most: int = 0  # requests at a time
    _now: int = 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.add(request.headers.get("Authorization"))
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0.002)
        self._now -= 1
        answer = (self.answers.pop(0) if self.answers else honest)(body)
        return web.Response(status=answer, text="no") if isinstance(answer, int) else web.json_response(answer)


@asynccontextmanager
async def serving(*servers: Server) -> AsyncIterator[None]:
    runners = []
    for server in servers:
        app = web.Application()
        app.router.add_post("/generate", server.handle)
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        site = web.TCPSite(runners[-1], "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    try:
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


def teacher(*servers: Server, **options: Any) -> ServedTeacher:
    return ServedTeacher(name="big", path="t", urls=tuple(server.url for server in servers), **options)


def play(*servers: Server, then: Callable[[TeacherClient], Any], **options: Any) -> Any:
    async def scenario() -> Any:
        async with serving(*servers):
            asked = teacher(*servers, **options)
            async with TeacherClient(asked, in_turn(asked.urls)) as client:
                return await then(client)

    return asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.teachers.FIRST_PAUSE_S", 0.001)


def test_log_probs_are_those_of_the_tokens_asked_for() -> None:
    server = Server()
    found = play(server, then=lambda client: client.logp([4, 5, 6, 7], 2))
    assert found == [said(6, 2), said(7, 3)]
    (body,) = server.asked
    assert body["input_ids"] == [4, 5, 6, 7]
    assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}
    assert body["return_logprob"]
    assert server.keys == {None}


def test_a_server_that_fails_is_followed_by_the_next() -> None:
    bad, good = Server([lambda _: 500, lambda _: 503]), Server()

    async def thrice(client: TeacherClient) -> tuple[list[list[float]], int]:
        return [await client.logp([1, 2], 1) for _ in range(3)], client.retries

    found, retries = play(bad, good, then=thrice)
    assert found == [[said(2, 1)]] * 3
    assert (len(bad.asked), len(good.asked), retries) == (3, 2, 2)


def test_one_that_never_answers_is_told_by_name() -> None:
    server = Server([lambda _: 500] * 4)
    with pytest.raises(TeacherFailed, match=r"teacher 'big' at http://127.0.0.1:\d+ did not answer, tried 4 times: .* 500"):
        play(server, then=lambda client: client.logp([1, 2], 1), retries=3)
    assert len(server.asked) == 4


def test_what_is_refused_is_not_asked_again() -> None:
    server = Server([lambda _: 400])
    with pytest.raises(EngineRefused, match=r"teacher 'big' at .* refused what it was asked: .*400"):
        play(server, then=lambda client: client.logp([1, 2], 1))
    assert len(server.asked) == 1


def test_servers_of_the_run_are_asked_while_they_serve() -> None:
    """One that is lost is not; where none serves the request waits for one that comes."""

    async def scenario() -> None:
        lost, other = Server(), Server()
        fleet = Fleet(patience_s=5.0, restarts=1, fixed_version=0)
        async with serving(lost, other), TeacherClient(teacher(lost), serving_in(fleet)) as client:
            members = [fleet.join(name, each.url) for name, each in (("a", lost), ("b", other))]
            for _ in range(4):
                await client.logp([1, 2], 1)
            assert (len(lost.asked), len(other.asked)) == (2, 2)
            fleet.lose(members[0], "it died")
            await client.logp([1, 2], 1)
            assert len(other.asked) == 3
            fleet.lose(members[1], "it died")
            waiting = asyncio.ensure_future(client.logp([1, 2], 1))
            await asyncio.sleep(0.02)
            assert not waiting.done()
            fleet.lose(fleet.join("a", lost.url), "again")
            fleet.join("b", other.url)
            assert await waiting == [said(2, 1)]

    asyncio.run(asyncio.wait_for(scenario(), 20))


def other_tokens(body: dict[str, Any]) -> Any:
    return honest({**body, "input_ids": [9, *body["input_ids"][1:-1], 9]})


def cut_short(body: dict[str, Any]) -> Any:
    return honest({**body, "input_ids": body["input_ids"][:-1]})


def no_number(body: dict[str, Any]) -> Any:
    answer = honest(body)
    answer["meta_info"]["input_token_logprobs"][-1][0] = None
    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: {"text": "hello"}, "without input_token_logprobs"),
        (lambda _: {"meta_info": {"input_token_logprobs": None}}, "without input_token_logprobs"),
        (other_tokens, "log-probs of 2 tokens, and not of the 2"),
        (cut_short, "log-probs of 1 tokens, and not of the 2"),
        (no_number, "the log-prob None to token 3, number 1"),
    ],
)
def test_an_answer_to_something_else_ends_in_an_error(answer: Answer, message: str) -> None:
    with pytest.raises(EngineError, match=f"teacher 'big' at .*{message}") as error:
        play(Server([answer]), then=lambda client: client.logp([1, 2, 3], 1))
    assert not isinstance(error.value, TeacherFailed | EngineRefused)


def test_a_token_that_the_teacher_does_not_have_is_not_sent_and_its_last_one_has_no_name() -> None:
    """As SGLang 0.5.23 answers: 0 in the place of the last id."""

    def last_is_zero(body: dict[str, Any]) -> Any:
        answer = honest(body)
        for row in answer["meta_info"]["input_token_logprobs"]:
            row[1] = 0 if row[1] == 9 else row[1]
        return answer

    async def scenario() -> None:
        server = Server([last_is_zero])
        async with serving(server):
            asked = teacher(server)
            async with TeacherClient(asked, in_turn(asked.urls), rows=10) as client:
                assert await client.logp([1, 9, 2], 1) == [said(9, 1), said(2, 2)]
                with pytest.raises(TeacherFailed, match="teacher 'big' has 10 tokens, and none with id 10"):
                    await client.logp([1, 10], 1)
        assert len(server.asked) == 1

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_requests_in_flight_are_bounded() -> None:
    server = Server()

    async def many(client: TeacherClient) -> None:
        await asyncio.gather(*(client.logp([1, 2], 1) for _ in range(12)))

    play(server, then=many, concurrency=3)
    assert server.most == 3


def group(source: str = "") -> TrajectoryGroup:
    """Two attempts; the first has a tool's turn between its own, the second a branch."""

    def turn(role: Any, *ids: int) -> Turn:
        return Turn(role, list(ids), [0.0] * len(ids), [0] * len(ids))

    first = [turn("assistant", 5, 6), turn("tool", 7), turn("assistant", 8)]
    branch = Branch([1, 2, 3], [turn("assistant", 4)])
    made = [
        Trajectory(0, [1, 2], first, Status.FINISHED, id=AttemptId(NAME, 0)),
        Trajectory(0, [1, 2], [turn("assistant", 9)], Status.FINISHED, reward=1.0, branches=[branch], id=AttemptId(NAME, 1)),
    ]
    return TrajectoryGroup(Prompt(0, (), "1", source=source), made, id=NAME)


def teach(server: Server, given: TrajectoryGroup, **options: Any) -> tuple[TrajectoryGroup, dict[str, float]]:
    async def scenario() -> tuple[TrajectoryGroup, dict[str, float]]:
        async with serving(server):
            of_code = teacher(server, **options)
            clients = {1: TeacherClient(of_code, in_turn(of_code.urls), read_key(of_code))}
            async with AskedTeachers(clients, lambda source: 1 if source == "code" else 0) as teachers:
                return await teachers.teach(given), teachers.metrics()

    return asyncio.run(asyncio.wait_for(scenario(), 20))


def test_every_own_turn_of_a_group_is_told_and_no_tool_turn() -> None:
    server, given = Server(), group("code")
    made, metrics = teach(server, given)
    assert given == group("code"), "what the journal has is not changed"
    told = [[turn.teacher_logp for turn in each.all_turns] for each in made.trajectories]
    first = [[said(5, 2), said(6, 3)], None, [said(8, 5)]]
    assert told == [first, [[said(9, 2)], [said(4, 3)]]]
    assert sorted(body["logprob_start_len"] for body in server.asked) == [1, 1, 2]
    assert metrics["teacher/seconds"] > 0
    assert metrics["teacher/retries"] == 0


def test_a_group_of_another_teacher_is_left_alone() -> None:
    server = Server()
    made, metrics = teach(server, group(""))
    assert all(turn.teacher_logp is None for each in made.trajectories for turn in each.all_turns)
    assert server.asked == []
    assert metrics == {"teacher/retries": 0.0}


def test_a_group_whose_teacher_fails_has_failed_with_the_reason() -> None:
    def fails_for_nine(body: dict[str, Any]) -> Any:
        return 500 if 9 in body["input_ids"] else honest(body)

    made, metrics = teach(Server([fails_for_nine] * 9), group("code"), retries=1)
    assert made.trajectories == []
    first, second = made.failed
    assert (first.aborted, first.reason, first.response_length) == (True, "another attempt of its group failed", 4)
    assert not second.aborted
    assert "teacher 'big' at" in second.reason
    assert second.reward == 1.0
    assert metrics["teacher/retries"] == 1


def test_the_key_of_a_file_is_sent(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    server = Server()
    teach(server, group("code"), key_file=str(tmp_path / "key"))
    assert server.keys == {"Bearer secret"}
