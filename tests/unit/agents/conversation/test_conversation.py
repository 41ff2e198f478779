"""Requests become turns: where each belongs, and which are the same again."""

from __future__ import annotations

import asyncio

import pytest

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.types import Generation, Status
from tests.support.agents import ADD, QUESTION, Play, echo, results
from tests.support.agents_talk import CALL, roles, run, two_turns


def test_a_tool_episode_is_one_trajectory(chat):
    play = Play(chat, CALL, "It is 2.")
    first, last, _ = run(two_turns(play))
    assert (first.content, first.finish, [(c.name, c.arguments) for c in first.calls]) == (
        "I add.",
        "tool_calls",
        [("add", '{"a": 1, "b": 1}')],
    )
    assert (last.content, last.finish, last.calls) == ("It is 2.", "stop", ())
    made = play.check()
    assert made.branches == []
    assert roles(made.turns) == ["assistant", "tool", "assistant"]
    assert made.status is Status.FINISHED
    assert made.tool_calls == 1
    assert "".join(last.texts) == "It is 2.<|im_end|>"
    assert len(last.texts) == len(last.token_ids) == len(last.logp) == len(last.versions)
    assert [*last.prompt_ids] == play.engine.log[1][0]
    text = chat.decode([*made.prompt_ids, *(i for turn in made.turns for i in turn.token_ids)], special=True)
    assert "<tool_response>\n2\n</tool_response>" in text
    assert text.count("<|im_end|>") == 5


def test_a_call_with_no_request_after_it_is_not_finished(chat):
    play = Play(chat, CALL, "It is 2.")
    run(play.ask(QUESTION))
    assert play.trajectory().status is Status.UNANSWERED
    assert play.trajectory(ending=["add"]).status is Status.FINISHED


def test_an_agent_that_asked_nothing_has_no_trajectory(chat):
    with pytest.raises(RolloutError, match="ended before any turn"):
        Play(chat, CALL).trajectory()


def test_a_skipped_turn_is_a_sample_of_its_own(chat):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        history = [*QUESTION, echo(first), *results(first, "2")]
        await play.ask(history)  # an answer without a call, which mini-swe-agent takes out again
        second = await play.ask([*history, {"role": "user", "content": "Use a tool."}])
        await play.ask([*history, {"role": "user", "content": "Use a tool."}, echo(second), *results(second, "4")])

    play = Play(chat, CALL, "Hm.", CALL, "It is 2.")
    run(talk(play))
    made = play.check()
    assert roles(made.turns) == ["assistant", "tool"] * 2 + ["assistant"]
    (branch,) = made.branches
    assert roles(branch.turns) == ["assistant"]
    assert chat.decode(branch.turns[0].token_ids) == "Hm."
    shared = len(made.prompt_ids) + len(made.turns[0].token_ids)
    assert branch.prompt_ids[:shared] == [*made.prompt_ids, *made.turns[0].token_ids]


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message | {"content": "I subtract."},
        lambda message: message | {"tool_calls": [{**message["tool_calls"][0], "function": {"name": "sub", "arguments": "{}"}}]},
        lambda message: (
            message | {"tool_calls": [{**message["tool_calls"][0], "function": {"name": "add", "arguments": '{"a": 1}'}}]}
        ),
        lambda message: {"role": "assistant", "content": message["content"]},
        lambda message: message | {"reasoning_content": "I never thought so."},
    ],
)
def test_a_rewritten_turn_starts_a_branch_and_is_not_marked_as_sampled(chat, change):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        await play.ask([*QUESTION, change(echo(first)), *results(first, "2")])

    play = Play(chat, CALL, "It is 2.")
    run(talk(play))
    made = play.check()
    assert [roles(made.turns), [roles(b.turns) for b in made.branches]] == [["assistant"], [["assistant"]]]


def test_another_tool_or_system_message_starts_a_branch(chat):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        history = [*QUESTION, echo(first), *results(first, "2")]
        other = {**ADD, "function": {**ADD["function"], "name": "sub"}}
        await play.ask(history, tools=(ADD, other))
        await play.ask([{"role": "system", "content": "It is noon."}, *history[1:]])

    play = Play(chat, CALL, "It is 2.", "Noon.")
    run(talk(play))
    assert len(play.check().branches) == 2


def test_a_retry_gets_the_first_generation(chat):
    async def talk(play: Play) -> None:
        first, last, history = await two_turns(play)
        assert await play.ask(history, retries=1) == last
        assert await play.ask(QUESTION, retries=2) == first

    play = Play(chat, CALL, "It is 2.")
    run(talk(play))
    assert len(play.engine.log) == 2
    assert play.check().branches == []


def test_the_same_request_on_purpose_is_another_sample(chat):
    async def talk(play: Play) -> None:
        one, other = await play.ask(QUESTION), await play.ask(QUESTION)
        assert one.id != other.id
        history = [*QUESTION, echo(one), *results(one, "2")]
        await play.ask(history)

    play = Play(chat, CALL, CALL, "It is 2.")
    run(talk(play))
    made = play.check()
    assert made.turns[0].rollout_logp[0] == 0.0  # the first: its call has its id
    assert len(made.branches) == 1


def test_a_turn_that_several_branches_share_is_in_one_sample(chat):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        shared = [*QUESTION, echo(first), *results(first, "2")]
        for words in ("Go on.", "Think again."):
            await play.ask([*shared, {"role": "user", "content": words}])
        await play.ask(QUESTION[1:])

    play = Play(chat, CALL, "It is 2.", "It is 3.", "It is 4.")
    run(talk(play))
    made = play.check()
    assert [roles(branch.turns) for branch in made.branches] == [["assistant", "tool", "assistant"], ["assistant"]]


def test_of_turns_that_say_the_same_the_one_with_more_of_the_history_is_meant(chat):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        history = [*QUESTION, echo(first), {"role": "user", "content": "And?"}]
        second = await play.ask(history)
        await play.ask(QUESTION)  # says what the first one said
        await play.ask([*history, echo(second), {"role": "user", "content": "And now?"}])

    play = Play(chat, "It is 2.", "Still.", "It is 2.", "Yes.")
    run(talk(play))
    assert play.tree.turns[3].after == 1


def test_what_an_engine_gave_wrongly_is_not_used(chat):
    class Silent:
        async def generate(self, input_ids, done, **options):
            done.append(Generation([5], [-1.0], [0]))
            done.finish = "stop"  # with a token that ends nothing
            return done

    async def talk(play: Play) -> None:
        right, play.conversation._generator = play.conversation._generator, Silent()
        with pytest.raises(RolloutError, match="stop tokens are"):
            await play.ask(QUESTION)
        play.conversation._generator = right
        assert (await play.ask(QUESTION, retries=1)).content == "It is 2."

    play = Play(chat, "It is 2.")
    run(talk(play))
    play.check()


def test_equal_requests_at_the_same_time_share_a_generation(chat):
    async def talk(play: Play) -> None:
        play.engine.pause = asyncio.Event()
        both = [asyncio.ensure_future(play.ask(QUESTION)) for _ in range(2)]
        await asyncio.sleep(0)
        play.engine.pause.set()
        one, other = await asyncio.gather(*both)
        assert one == other

    play = Play(chat, "It is 2.")
    run(talk(play))
    assert len(play.engine.log) == 1


def test_a_client_that_is_gone_finds_its_turn_when_it_comes_back(chat):
    async def talk(play: Play) -> None:
        play.engine.pause = asyncio.Event()
        asked = asyncio.ensure_future(play.ask(QUESTION))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        play.engine.pause.set()
        assert (await play.ask(QUESTION)).content == "It is 2."
        assert (await play.ask(QUESTION)).content == "Two."  # it had that answer

    play = Play(chat, "It is 2.", "Two.")
    run(talk(play))
    assert len(play.check().branches) == 1


def test_an_engine_that_fails_goes_on_from_what_was_sampled(chat):
    async def talk(play: Play) -> None:
        play.engine.fails = 1
        with pytest.raises(ConnectionError):
            await play.ask(QUESTION)
        assert len(play.tree.turns[0].sampled.token_ids) == 1
        assert (await play.ask(QUESTION)).content == "It is 2."

    play = Play(chat, "It is 2.")
    run(talk(play))
    play.check()


def test_an_endpoint_that_is_restarted_goes_on(chat):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        play.restart()
        history = [*QUESTION, echo(first), *results(first, "2")]
        last = await play.ask(history)
        play.restart()
        assert await play.ask(history, retries=1) == last

    play = Play(chat, CALL, "It is 2.")
    run(talk(play))
    assert play.check().branches == []
