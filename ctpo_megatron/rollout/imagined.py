"""A conversation that a rollout could have, to hold what rollouts build against the template before a run."""

from __future__ import annotations

from collections.abc import Sequence

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.frames import ToolFrames
from ctpo_megatron.rollout.template import ChatTemplate, Message
from ctpo_megatron.rollout.turns import SpokenTurn, TurnReader

# what a tool says: quotes, brackets and spaces, which templates may change
OUTPUTS = ('4\n"x" <b> & ', "  ['é', 2]\n")


def imagine(
    template: ChatTemplate, frames: ToolFrames, reader: TurnReader, messages: Sequence[Message], end: str, reasoning: str
) -> tuple[list[SpokenTurn], str]:
    """Turns that end with the stop token `end`, an output after each, as a rollout joins them; and the template's own text.

    Every turn says `reasoning` and a few words.
    """
    role, talk = frames.role_after(end), list(messages)
    turns: list[SpokenTurn] = []
    for number, output in enumerate(OUTPUTS):
        head = template.render(talk, prompt=True)
        opening = reader.opening(talk, head)
        words = f"{reasoning}Sum {number}."
        talk.append({"role": "assistant", "content": words})
        try:
            body, _ = reader.own_words(talk, head, turns[-1].tail if turns else "")
        except RenderError:  # the template drops the reasoning of a finished turn
            body = words
        after = frames.after_end(end, OUTPUTS[: number + 1])
        turns.append(SpokenTurn(head, opening, body, end, end + after if frames.ends[role] == end else after))
        talk.append({"role": role, "content": output})
    return turns, template.render(talk, prompt=True)
