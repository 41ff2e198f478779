"""A conversation built turn by turn, held against the template's own rendering of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.turns import SpokenTurn, common_start, difference

KEPT = "the template leaves reasoning, or what it opens a turn with, out of earlier turns; here all stays as the model wrote it"
TWO_ENDS = (
    "the template ends an earlier turn with another token than the last; here the model's stands, and the template's after it"
)


@dataclass(frozen=True, slots=True)
class Likeness:
    """How a template's text of a whole conversation is like its turns, none of which it contradicts."""

    said: frozenset[str]  # what the template changes in earlier turns, as sentences; empty where the text is the same
    left_out: tuple[str, ...]  # of each turn, the beginning of its words that the whole does not have
    opened: tuple[bool, ...]  # of each turn, whether the whole has all that stands before it


def compare(whole: str, turns: Sequence[SpokenTurn], *, last: bool) -> Likeness:
    """What the template changes in earlier turns when it writes them as parts of `whole`.

    It may leave out the beginning of an earlier turn, its reasoning, or what it opened the turn with for a generation; nothing
    else may differ. `last`: the last of `turns` ends the conversation. Raises RenderError, which shows both texts.
    """
    said: set[str] = set()
    left_out, opened = [], []
    rest, head = whole, turns[0].head
    for number, turn in enumerate(turns):
        closes = last and number == len(turns) - 1
        follows = turn.end if closes else turn.tail
        if number < len(turns) - 1:
            follows = follows[: len(follows) - len(turns[number + 1].opening)]
        cuts = _cuts(rest, head, turn, follows, closes)
        cut = next(((a, b) for a, b in cuts if turn.body.endswith(rest[a:b])), None)
        if cut is None:
            raise _differ(whole, turns)
        begun, ended = cut
        left_out.append(turn.body[: len(turn.body) - (ended - begun)])
        opened.append(begun == len(head))
        if not opened[-1] or left_out[-1]:
            said.add(KEPT)
        if not closes and not turn.tail.startswith(turn.end):
            said.add(TWO_ENDS)
        rest, head = rest[ended:], turn.tail
    if not last and rest != turns[-1].tail:
        raise _differ(whole, turns)
    return Likeness(frozenset(said), tuple(left_out), tuple(opened))


def _cuts(rest: str, head: str, turn: SpokenTurn, follows: str, closes: bool) -> Iterator[tuple[int, int]]:
    """Where in `rest` the words of `turn` may stand: after `head`, or after `head` less some of its opening; before `follows`."""
    begun = common_start(rest, head)
    ended = rest.find(follows, begun)
    if ended < 0 and closes:
        ended = len(rest)  # the template leaves the end to the next role's token
    if ended >= 0:
        yield from ((start, ended) for start in range(begun, len(head) - len(turn.opening) - 1, -1))


def _differ(whole: str, turns: Sequence[SpokenTurn]) -> RenderError:
    built = turns[0].head + "".join(turn.body + (turn.tail or turn.end) for turn in turns)
    return RenderError(
        "the chat template writes this conversation as a whole otherwise than turn by turn, which is how a model meets it. "
        f"{difference(built, whole, 'turn by turn', 'as a whole')}."
    )
