"""The order of prompts over stops and changed settings: every prompt of an epoch once, whatever is changed between starts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.data.order import PromptSampler, last_seed
from ctpo_megatron.errors import DataError
from ctpo_megatron.loop.admission import Admission, Admitted
from ctpo_megatron.types import GroupId, Prompt
from tests.support.often import often


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, ({"role": "user", "content": f"question {i}"},), str(i)) for i in range(count)]


@dataclass(frozen=True)
class Stretch:
    """What a run does between two starts."""

    seed: int
    steps: int
    prompts_per_step: int
    ahead: int  # steps that rollouts are ahead of training when it stops: groups that are sampled and not trained on
    saved_before_end: int  # steps that were trained after the last checkpoint, and are lost


STRETCHES = st.builds(
    Stretch,
    seed=st.integers(0, 3),
    steps=st.integers(0, 4),
    prompts_per_step=st.integers(1, 9),
    ahead=st.integers(0, 2),
    saved_before_end=st.integers(0, 2),
)


@settings(deadline=None, max_examples=often(100))
@given(count=st.integers(1, 20), stretches=st.lists(STRETCHES, min_size=1, max_size=8))
def test_each_prompt_of_an_epoch_comes_once_whatever_changes_between_starts(count: int, stretches: list[Stretch]) -> None:
    rows = prompts(count)
    kept: list[tuple[int, str]] = []  # what the checkpoints answer for
    position: dict[str, Any] | None = None
    groups, steps = 0, 0
    still_open: tuple[Admitted, ...] = ()
    for each in stretches:
        sampler = PromptSampler(rows, each.seed) if position is None else PromptSampler.restore(rows, position, each.seed)
        admission = Admission(sampler, groups, still_open)
        first, queue, taken, after = steps, [*admission.reopened], [], []
        for step in range(first, first + each.steps):
            wanted = (each.ahead + 1) * each.prompts_per_step  # rollouts are so far ahead when a step is made
            queue += [admission.next(step) for _ in range(wanted - len(queue))]
            taken += [(step, group) for group in queue[: each.prompts_per_step]]
            queue = queue[each.prompts_per_step :]
            after.append(admission.position(queue))
        last = first + each.steps - each.saved_before_end  # steps that the newest checkpoint holds
        if last <= first:
            continue
        position, groups, steps = json.loads(json.dumps(after[last - first - 1].cursor)), after[last - first - 1].groups, last
        still_open = after[last - first - 1].open
        kept += [(group.prompt.index, str(group.id)) for step, group in taken if step < last]
    kept += [(group.prompt.index, str(group.id)) for group in still_open]
    seen = [index for index, _ in kept]
    assert groups == len(seen) == len({group for _, group in kept})
    assert sorted(group for _, group in kept) == [str(GroupId(number)) for number in range(groups)]
    for epoch in range(0, len(seen), count):
        found = Counter(seen[epoch : epoch + count])
        assert max(found.values()) == 1
        assert len(found) == count or epoch + count > len(seen)


@settings(deadline=None, max_examples=often(60))
@given(count=st.integers(2, 30), taken=st.integers(0, 60), seeds=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_starts_that_train_on_nothing_leave_no_trace(count: int, taken: int, seeds: list[int]) -> None:
    """Seeds that ordered no prompt have no part in what follows; the first one again is as if there had been none."""
    rows = prompts(count)
    sampler = PromptSampler(rows, seeds[0])
    sampler.next(taken)
    state = sampler.state()
    tried = state
    for seed in (*seeds, seeds[0]):
        tried = PromptSampler.restore(rows, tried, seed).state()
    expected = sampler.next(2 * count)
    assert PromptSampler.restore(rows, tried).next(2 * count) == expected
    direct = PromptSampler.restore(rows, state, seeds[-1]).next(count)
    for seed in seeds:
        state = PromptSampler.restore(rows, state, seed).state()
    assert PromptSampler.restore(rows, state).next(count) == direct


def test_another_seed_orders_the_rest_anew_and_the_epochs_after_it() -> None:
    rows = prompts(40)
    sampler = PromptSampler(rows, 1)
    begun = [p.index for p in sampler.next(15)]
    first = [p.index for p in sampler.next(0)] + [p.index for p in PromptSampler.restore(rows, sampler.state()).next(25)]
    other = PromptSampler.restore(rows, sampler.state(), 2)
    rest = [p.index for p in other.next(25)]
    assert sorted(rest) == sorted(first)
    assert rest != first
    assert sorted(begun + rest) == list(range(40))
    assert other.next(40) == [rows[i] for i in np.random.default_rng([2, 1]).permutation(40)]  # as a run with that seed has it
    assert last_seed(other.state()) == 2


def test_positions_of_earlier_releases_are_read() -> None:
    rows = prompts(30)
    state = PromptSampler(rows, 4).state()
    old = {key: value for key, value in state.items() if key != "seeds"} | {"seed": 4, "epoch": 2, "position": 11}
    expected = [rows[i] for i in np.random.default_rng([4, 2]).permutation(30)[11:]]
    assert PromptSampler.restore(rows, old).next(19) == expected
    assert PromptSampler.restore(rows, old, 4).next(19) == expected
    assert last_seed(old) == 4


@pytest.mark.parametrize(
    "changed",
    [
        prompts(30)[:-1],
        [*prompts(30), Prompt(30, ({"role": "user", "content": "more"},), "1")],
        [Prompt(p.index, p.messages, "another answer" if p.index == 7 else p.answer) for p in prompts(30)],
        [Prompt(p.index, ({"role": "system", "content": "Think."}, *p.messages), p.answer) for p in prompts(30)],
        prompts(30)[::-1],
    ],
    ids=["a row less", "a row more", "another answer", "a system prompt", "another order"],
)
def test_other_prompts_are_refused(changed: list[Prompt]) -> None:
    with pytest.raises(DataError, match="the prompts changed"):
        PromptSampler.restore(changed, PromptSampler(prompts(30), 1).state(), 1)
