"""What ends a turn or an attempt, what is refused, and what is recorded of tokens that are cut."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from ctpo_megatron.agents.conversation.cutting import cut_at
from ctpo_megatron.agents.conversation.tree import Tree
from ctpo_megatron.agents.protocols import EpisodeOver, RequestUnusable
from ctpo_megatron.types import Generation, Status, Supports, TopK
from tests.support.agents import ADD, QUESTION, Play, echo, hermes, results
from tests.support.agents_talk import CALL, TWO, run, two_turns


def test_a_closed_attempt_takes_no_requests_and_keeps_no_part(chat):
    async def talk(play: Play) -> None:
        await play.ask(QUESTION)
        play.engine.pause = asyncio.Event()
        asked = asyncio.ensure_future(play.ask(QUESTION[1:]))
        await asyncio.sleep(0)
        await play.conversation.close()
        with pytest.raises(EpisodeOver, match="has ended"):
            await asked
        with pytest.raises(EpisodeOver, match="has ended"):
            await play.ask(QUESTION, retries=1)

    play = Play(chat, CALL, "It is 2.")
    run(talk(play))
    assert play.check().status is Status.UNANSWERED


def test_turns_of_all_branches_count(chat):
    async def talk(play: Play) -> None:
        for _ in range(2):
            await play.ask(QUESTION)
        with pytest.raises(EpisodeOver, match="all of its 2 turns"):
            await play.ask(QUESTION)

    play = Play(chat, CALL, turns=2)
    run(talk(play))
    assert play.trajectory().status is Status.MAX_TURNS


def test_the_response_is_cut_where_the_budget_ends_and_no_request_is_taken_behind_it(chat):
    async def talk(play: Play) -> None:
        answer = await play.ask(QUESTION)
        assert (answer.finish, len(answer.token_ids)) == ("length", 20)
        with pytest.raises(EpisodeOver, match="fewer than 20 after these"):
            await play.ask([*QUESTION, echo(answer), {"role": "user", "content": "Go on."}])

    play = Play(chat, "a" * 50, tokens=20)
    run(talk(play))
    assert play.trajectory().status is Status.LENGTH


def test_a_prompt_that_fills_the_context_is_refused(chat):
    play = Play(chat, "It is 2.", context=len(chat.talk_ids(QUESTION, tools=(ADD,))))
    with pytest.raises(EpisodeOver, match="in all"):
        run(play.ask(QUESTION))


def test_a_turn_that_its_client_cut_is_ended_by_the_template(chat):
    async def talk(play: Play) -> None:
        answer = await play.ask(QUESTION, max_tokens=5)
        assert (answer.finish, answer.content) == ("length", "It is")
        await play.ask([*QUESTION, echo(answer), {"role": "user", "content": "Go on."}])

    play = Play(chat, "It is 2.")
    run(talk(play))
    made = play.check()
    text = chat.decode([i for turn in made.turns for i in turn.token_ids], special=True)
    assert text.startswith("It is<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n")


def test_an_attempt_whose_time_is_over(chat):
    async def talk() -> Play:
        play = Play(chat, CALL, deadline=asyncio.get_running_loop().time())
        with pytest.raises(EpisodeOver, match="its time is over"):
            await play.ask(QUESTION)
        return play

    assert run(talk()).tree.refused is Status.DEADLINE


def test_a_stop_text_ends_a_turn_and_its_tokens_with_it(chat):
    async def talk(play: Play) -> None:
        answer = await play.ask(QUESTION, stop=("</code>", "Observation"))
        assert answer.content == "<code>1 + 1"
        assert chat.decode(answer.token_ids) == "<code>1 + 1</code>"
        assert answer.finish == "stop"
        back = {"role": "assistant", "content": "<code>1 + 1</code>\nCalling tools:\n[{'id': 'call_1', 'arguments': '1 + 1'}]"}
        await play.ask([*QUESTION, back, {"role": "user", "content": "Observation:\n2"}])

    play = Play(chat, "<code>1 + 1</code> Observation: 3", "It is 2.")
    run(talk(play))
    made = play.trajectory()
    assert made.branches == []
    assert made.turns[0].token_ids == play.engine.log[0][1].token_ids[: len(made.turns[0].token_ids)]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ([{"role": "robot", "content": "hi"}], "role is 'robot'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content is a list"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "is no call"),
    ],
)
def test_a_request_that_no_repeat_makes_right(chat, messages, words):
    play = Play(chat, CALL)
    with pytest.raises(RequestUnusable, match=words):
        run(play.ask(messages))
    with pytest.raises(RequestUnusable, match="max_tokens is 0"):
        run(play.ask(QUESTION, max_tokens=0))


def test_text_that_is_no_utf_8_is_shown_as_unreadable_and_kept_over_a_restart(chat):
    async def talk(play: Play) -> None:
        half = "\ud83d"
        tool = {**ADD, "function": {**ADD["function"], "description": half}}
        first = await play.ask([{"role": "user", "content": f"{half} \ud83d\ude42"}], tools=(tool,))
        play.restart()
        history = [{"role": "user", "content": f"{half} \ud83d\ude42"}, echo(first), *results(first, half)]
        await play.ask(history, tools=(tool,))

    play = Play(chat, CALL, "It is 2.")
    run(talk(play))
    made = play.check()
    assert made.branches == []
    assert "\N{REPLACEMENT CHARACTER} \N{SLIGHTLY SMILING FACE}" in chat.decode(made.prompt_ids)


def test_tools_that_are_nested_too_deeply(chat):
    parameters: dict = {}
    for _ in range(5000):
        parameters = {"properties": parameters}
    tool = {**ADD, "function": {"name": "add", "parameters": parameters}}
    with pytest.raises(RequestUnusable, match="too deeply"):
        run(Play(chat, CALL).ask(QUESTION, tools=(tool,), digest="x"))


def test_results_come_in_the_order_of_their_calls(chat):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION)
        two, four = results(first, "2", "4")
        second = await play.ask([*QUESTION, echo(first), four, two])
        await play.ask([*QUESTION, echo(first), two, four, echo(second), {"role": "user", "content": "Thanks."}])

    play = Play(chat, TWO, "2 and 4.", "Bye.")
    run(talk(play))
    made = play.check()
    assert made.branches == []
    text = chat.decode(made.turns[1].token_ids)
    assert text.index("2") < text.index("4")


def test_a_call_that_cannot_be_used_stays_content(chat):
    broken = hermes("add", '{"a": 1,')
    answer = run(Play(chat, broken).ask(QUESTION))
    assert (answer.content, answer.calls, answer.finish) == (broken, (), "stop")


def test_a_prompt_that_opens_the_reasoning(chats):
    chat = chats("qwen3-thinking")
    play = Play(chat, "I add.\n</think>\n\n" + CALL, "</think>It is 2.")
    first, last, _ = run(two_turns(play))
    assert (first.reasoning, first.content, len(first.calls)) == ("I add.", "I add.", 1)
    assert last.content == "It is 2."
    assert play.check().branches == []


def test_thinking_on_and_off(chats):
    async def talk(play: Play) -> None:
        first = await play.ask(QUESTION, thinking=False)
        assert chat.decode(first.prompt_ids, special=True).endswith("<think>\n\n</think>\n\n")
        history = [*QUESTION, echo(first), *results(first, "2")]
        second = await play.ask(history, thinking=False)
        assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
        assert chat.decode(second.prompt_ids, special=True).endswith("<think>\n\n</think>\n\n")
        third = await play.ask([*history, echo(second), {"role": "user", "content": "And?"}], thinking=True)
        assert chat.decode(third.prompt_ids, special=True).endswith("<|im_start|>assistant\n")

    chat = chats("qwen3")
    play = Play(chat, CALL, "It is 2.", "Yes.")
    run(talk(play))
    assert play.check().branches == []


def test_tools_that_the_parser_refuses(chat):
    class Strict:
        def parse(self, text, tools):
            raise ValueError("tools[0] has no name")

    play = Play(chat, CALL)
    play.conversation._parser = Strict()
    with pytest.raises(RequestUnusable, match=r"tools: tools\[0\] has no name"):
        run(play.ask(QUESTION))
    assert play.tree.turns == []


def test_what_is_recorded_of_tokens_is_cut_with_them(chat):
    ids = chat.assistant_ids("one stop two")
    count = len(ids)
    top = TopK(np.arange(2 * count, dtype=np.int32).reshape(count, 2), np.zeros((count, 2), np.float32))
    supports = Supports(np.arange(3 * count, dtype=np.int32), np.full(count, 3, np.int32))
    experts = np.arange(count + 4, dtype=np.int8).reshape(-1, 1, 1)  # of five tokens before too, and not of the last one
    made = Generation(ids, [-1.0 * n for n in range(count)], [*range(count)], "stop", top, experts, supports)
    cut, text = cut_at(made, ["stop", "two"], lambda some: chat.decode(some), set(chat.stop_token_ids))
    assert text == "one "
    kept = len(cut.token_ids)
    assert chat.decode(cut.token_ids) == "one stop"
    assert len(cut.rollout_logp) == len(cut.versions) == len(cut.top_k.ids) == len(cut.supports.counts) == kept
    assert len(cut.supports.ids) == 3 * kept
    assert len(cut.routed_experts) == kept + 4
    same, text = cut_at(made, ["three"], lambda some: chat.decode(some), set(chat.stop_token_ids))
    assert same is made
    assert text == "one stop two"


def test_routing_is_recorded_along_each_way(chat):
    class Routed:
        """Says where each token went by its place in the stream."""

        def __init__(self, engine):
            self.engine = engine

        async def generate(self, input_ids, done, *, recorded, **options):
            made = await self.engine.generate(input_ids, done, **options)
            last = len(input_ids) + len(made.token_ids) - 1
            made.routed_experts = np.arange(recorded, last, dtype=np.int16).reshape(-1, 1, 1)
            return made

    async def talk(play: Play) -> None:
        bounds = play.conversation._bounds
        play.conversation._generator = Routed(play.engine)
        play.conversation._bounds = replace(bounds, sampling=replace(bounds.sampling, record=True))
        _, _, history = await two_turns(play)
        await play.ask([*history, {"role": "user", "content": "Think again."}])
        await play.ask(QUESTION[1:])

    play = Play(chat, CALL, "It is 2.", "It is 3.", "It is 4.")
    run(talk(play))
    play.tree = Tree.parse(play.tree.dump())
    made = play.check()
    for each in (made, *made.branches):
        length = len(each.prompt_ids) + sum(len(turn.token_ids) for turn in each.turns) - 1
        assert each.routed_experts[:, 0, 0].tolist() == list(range(length))
