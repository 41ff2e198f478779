"""Which samples of an optimizer step need no pass: those whose advantage is zero at every token.

An objective's token loss is a multiple of the token's advantage, unless it says otherwise (`acts_without_advantage`), so such a
sample has no gradient. It counts in every mean all the same: the weights of sequences are found before it is left out. Where a
critic learns, which makes the advantages of rewards, every sample has a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from ctpo_megatron.types import TrainSample


def spared(samples: Sequence[TrainSample], fewest: int) -> list[int]:
    """Returns the places, in ascending order, of the samples that need no pass.

    Of those without an advantage the first get one as well, until `fewest` tokens of the newest policy version have one, as far
    as there are so many: the drift is measured on these.
    """
    known = [sample.rewards is None for sample in samples]
    idle = [place for place, sample in enumerate(samples) if known[place] and not any(sample.advantages)]  # NaN counts as one
    if not idle:
        return []
    newest = max((version for sample in samples for version in sample.versions), default=-1)
    of_newest = [sum(v == newest and wrote for v, wrote in zip(s.versions, s.mask, strict=True)) for s in samples]
    seen = sum(of_newest) - sum(of_newest[place] for place in idle)
    left = []
    for place in idle:
        if seen < fewest and of_newest[place]:
            seen += of_newest[place]
        else:
            left.append(place)
    return left
