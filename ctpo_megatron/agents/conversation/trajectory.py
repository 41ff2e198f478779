"""From the turns of an attempt to what is trained on: each sampled turn in exactly one sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ctpo_megatron.agents.conversation.tree import SampledTurn, Tree, tokens
from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.protocols import TalkChat
from ctpo_megatron.types import AttemptId, Branch, Status, Trajectory, Turn


def trajectory_of(
    tree: Tree, chat: TalkChat, attempt: AttemptId, prompt_index: int, *, ending: Collection[str] = ()
) -> Trajectory:
    """Returns the trajectory of an attempt that has ended, without reward: the way to its newest turn, and branches.

    A branch is another way, from the first turn on that no sample before it has; all that is before is its prompt. `ending`: see
    `status_of`. Raises RolloutError where nothing was sampled.
    """
    main = _last_way(tree)
    if not main:
        raise RolloutError("the agent ended before any turn was sampled for it: it sent no request that could be answered")
    followed = {turn.after for turn in tree.turns if turn.whole}
    ends = [turn for turn in tree.turns if turn.whole and turn.number not in followed and turn is not main[-1]]
    seen = {turn.number for turn in main}
    branches = []
    for end in ends:
        way = tree.way(end.number)
        first = next(place for place, turn in enumerate(way) if turn.number not in seen)
        seen |= {turn.number for turn in way}
        prompt = [*tokens(way[:first]), *way[first].rendered]
        branches.append(Branch(prompt, _turns(way[first:]), _experts(way)))
    whole = [turn for turn in tree.turns if turn.whole]
    return Trajectory(
        id=attempt,
        prompt_index=prompt_index,
        prompt_ids=main[0].rendered,
        turns=_turns(main),
        status=status_of(tree, ending),
        text=chat.decode(tokens(main)[len(main[0].rendered) :], special=True),
        tool_calls=sum(len(turn.calls) for turn in whole),
        routed_experts=_experts(main),
        branches=branches,
    )


def status_of(tree: Tree, ending: Collection[str] = ()) -> Status:
    """Returns how an attempt has ended: by what its last request came to, or by its newest turn.

    A turn that calls a tool, and to which nothing came back, is no end of a conversation, unless it calls one of `ending`, the
    tools that an agent answers its task with.
    """
    last = _last_way(tree)
    if tree.refused is not None:
        return tree.refused
    if not last:
        return Status.UNANSWERED
    turn = last[-1]
    if turn.sampled.finish == "deadline":
        return Status.DEADLINE
    if turn.sampled.finish == "length":
        return Status.LENGTH
    if turn.calls and not any(call.name in ending for call in turn.calls):
        return Status.UNANSWERED
    return Status.FINISHED


def written(tree: Tree, chat: TalkChat) -> str:
    """Returns what the assistant wrote on the way to its newest turn, for rewards."""
    return "\n".join(chat.decode(turn.sampled.token_ids) for turn in _last_way(tree))


def _last_way(tree: Tree) -> list[SampledTurn]:
    newest = next((turn for turn in reversed(tree.turns) if turn.whole), None)
    return [] if newest is None else tree.way(newest.number)


def _turns(way: Sequence[SampledTurn]) -> list[Turn]:
    """The turns of a way as streams, without what is rendered before the first one."""
    turns: list[Turn] = []
    for place, each in enumerate(way):
        if place and each.rendered:
            count = len(each.rendered)
            turns.append(Turn("tool", each.rendered, [0.0] * count, [-1] * count))
        made = each.sampled
        turns.append(Turn("assistant", made.token_ids, made.rollout_logp, made.versions, made.top_k, made.supports))
    return turns


def _experts(way: Sequence[SampledTurn]) -> np.ndarray | None:
    found = [turn.sampled.routed_experts for turn in way if turn.sampled.routed_experts is not None]
    return np.concatenate(found) if found else None
