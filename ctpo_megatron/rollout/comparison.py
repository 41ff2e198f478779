"""A conversation built turn by turn, held against the template's own rendering of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import commonprefix

from ctpo_megatron.errors import RenderError
from ctpo_megatron.rollout.turns import SpokenTurn, difference

KEPT = "the template leaves the beginning of earlier turns out (reasoning); here it stays as the model wrote it"
TWO_ENDS = "the template ends an earlier turn with another token than the last; here both stand, the model's and then the template's"


def compare(whole: str, turns: Sequence[SpokenTurn], *, last: bool) -> set[str]:
    """What the template changes in earlier turns: a set of sentences, empty where `whole` is exactly what `turns` say.

    A template may leave out the beginning of an earlier turn, its reasoning, or what it opened the turn with for a generation;
    nothing else may differ. `last`: the last of `turns` ends the conversation. Raises RenderError, which shows both texts.
    """
    said: set[str] = set()
    rest, head = whole, turns[0].head
    for turn in turns:
        closes = last and turn is turns[-1]
        cuts = _cuts(rest, head, turn, turn.end if closes else turn.tail, closes)
        cut = next(((a, b) for a, b in cuts if turn.body.endswith(rest[a:b])), None)
        if cut is None:
            raise _differ(whole, turns)
        begun, ended = cut
        if begun < len(head) or ended - begun < len(turn.body):
            said.add(KEPT)
        if not closes and not turn.tail.startswith(turn.end):
            said.add(TWO_ENDS)
        rest, head = rest[ended:], turn.tail
    if not last and rest != turns[-1].tail:
        raise _differ(whole, turns)
    return said


def _cuts(rest: str, head: str, turn: SpokenTurn, follows: str, closes: bool) -> Iterator[tuple[int, int]]:
    """Where in `rest` the words of `turn` may stand: after `head`, or after `head` less some of its opening; before `follows`."""
    begun = len(commonprefix([rest, head]))
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
