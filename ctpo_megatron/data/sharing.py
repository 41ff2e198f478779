"""Prompts that the samples of a group have in common: a micro-batch reads them once, as a sequence of their own.

The samples follow it as branches, which attend to it as well as to themselves. The last token of a prompt, whose label the
policy wrote, is each sample's own, so what is shared has no label that anyone trains on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ctpo_megatron.data.balance import round_up
from ctpo_megatron.types import TopK, TrainSample


@dataclass(frozen=True, slots=True)
class Family:
    """Samples that are in one micro-batch, by their places, and how many of their first tokens are read once for all; 0: none."""

    members: tuple[int, ...]
    shared: int = 0

    def positions(self, samples: Sequence[TrainSample], step: int) -> int:
        """Returns how long it is, each of its sequences padded to a multiple of `step`."""
        own = sum(round_up(max(len(samples[place]) - self.shared, 1), step) for place in self.members)
        return own + round_up(self.shared, step)


def alone(samples: Sequence[TrainSample]) -> list[Family]:
    """Returns a family for each sample: nothing is shared."""
    return [Family((place,)) for place in range(len(samples))]


def families(samples: Sequence[TrainSample], *, fewest: int, capacity: int, step: int) -> list[Family]:
    """Returns all samples in families of neighbours of a group that begin with at least `fewest` common tokens.

    None is longer than `capacity` positions, as long as no sample is; see `Family.positions` for `step`.
    """
    found: list[Family] = []
    for places in _runs(samples):
        shared = common_tokens([samples[place] for place in places])
        if len(places) == 1 or shared < max(fewest, 1):
            found += [Family((place,)) for place in places]
        else:
            found += _cut(places, shared, samples, capacity, step)
    return found


def common_tokens(samples: Sequence[TrainSample]) -> int:
    """Returns how many positions all samples begin with that have the same input and label and nothing that the policy wrote."""
    first = samples[0]
    count = min(sample.mask.index(True) if True in sample.mask else len(sample) - 1 for sample in samples)
    for sample in samples[1:]:
        for own, other in ((sample.input_ids, first.input_ids), (sample.labels, first.labels)):
            if own[:count] != other[:count]:
                count = next(place for place in range(count) if own[place] != other[place])
    return count


def part(sample: TrainSample, begin: int, end: int | None = None) -> TrainSample:
    """Returns the positions from `begin` to `end` of a sample."""
    own = slice(begin, end)
    supports, top_k, routed = sample.supports, sample.top_k, sample.routed_experts
    return replace(
        sample,
        input_ids=sample.input_ids[own],
        labels=sample.labels[own],
        mask=sample.mask[own],
        rollout_logp=sample.rollout_logp[own],
        versions=sample.versions[own],
        advantages=sample.advantages[own],
        routed_experts=None if routed is None else routed[own],
        top_k=None if top_k is None else TopK(top_k.ids[own], top_k.logp[own]),
        supports=None if supports is None else supports.part(own),
        teacher_logp=None if sample.teacher_logp is None else sample.teacher_logp[own],
        rewards=None if sample.rewards is None else sample.rewards[own],
    )


def _runs(samples: Sequence[TrainSample]) -> list[list[int]]:
    """The places of samples in runs of one group."""
    runs: list[list[int]] = []
    for place, sample in enumerate(samples):
        if runs and samples[runs[-1][-1]].group == sample.group:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _cut(places: Sequence[int], shared: int, samples: Sequence[TrainSample], capacity: int, step: int) -> list[Family]:
    """Families that are filled one after the other, as far as there is room; a sample that has none with the prompt is alone."""
    found: list[Family] = []
    for place in places:
        wider = Family((*found[-1].members, place), shared) if found else None
        if wider is not None and wider.positions(samples, step) <= capacity:
            found[-1] = wider
        else:
            found.append(Family((place,), shared))
    return [each if len(each.members) > 1 else Family(each.members) for each in found]
