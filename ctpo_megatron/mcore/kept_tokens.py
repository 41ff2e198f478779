"""What an update makes of each token, on its way to the record: kept on a rank until the driver asks for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ctpo_megatron.algorithms import Seen
from ctpo_megatron.batch import KeptShard, MicroBatch
from ctpo_megatron.record.token_files import NOT_TRAINED

SeenBy = Callable[[MicroBatch], list[Seen]]
"""Where the loss of a micro-batch puts what it saw, part by part."""
NoteGap = Callable[[MicroBatch, Tensor], None]
"""Takes the log-probs of trainer less engine in a micro-batch, [T_local]."""


class KeptTokens:
    """Of one update. Streams stay on the device until `take`, so that no micro-batch waits for a copy."""

    def __init__(self) -> None:
        self._gaps: dict[int, dict[int, Tensor]] = {}  # optimizer step, place of the micro-batch: [T_local]
        self._seen: list[list[list[Seen]]] = []  # the same, in parts

    def before(self, number: int, placed: list[MicroBatch]) -> NoteGap:
        """Returns what keeps the distance from the engine of optimizer step `number`, whose micro-batches are `placed`."""
        gaps = self._gaps.setdefault(number, {})
        places = {id(mb.sequences): place for place, mb in enumerate(placed)}  # see `seen`

        def note(mb: MicroBatch, gap: Tensor) -> None:
            gaps[places[id(mb.sequences)]] = gap.detach().half()

        return note

    def seen(self, number: int, placed: list[MicroBatch]) -> SeenBy:
        """Returns where the losses of optimizer step `number` put what they see. `placed`: its micro-batches on the device."""
        parts: list[list[Seen]] = [[] for _ in placed]
        self._seen[number:] = [parts]
        # the schedule hands on these objects, and a copy of a micro-batch with other streams has the sequences of the first
        by_sequences = {id(mb.sequences): found for mb, found in zip(placed, parts, strict=True)}
        return lambda mb: by_sequences[id(mb.sequences)]

    def forget(self, number: int) -> None:
        """Let go what optimizer step `number` and later ones saw: it was not applied."""
        del self._seen[number:]

    def take(self) -> list[list[KeptShard]]:
        """Returns this rank's shards in host memory, [optimizer step][micro-batch]; none before the last pipeline stage.

        Of optimizer steps that were not made, or not applied, tokens have gaps only.
        """
        return [
            [_shard(gap, self._seen[number][place] if number < len(self._seen) else []) for place, gap in sorted(gaps.items())]
            for number, gaps in sorted(self._gaps.items())
        ]


def _shard(gap: Tensor, seen: list[Seen]) -> KeptShard:
    if seen:
        log_ratio, fate = torch.cat([each.log_ratio for each in seen]), torch.cat([each.fate for each in seen])
    else:
        log_ratio, fate = torch.full_like(gap, torch.nan), torch.full_like(gap, NOT_TRAINED, dtype=torch.uint8)
    return KeptShard(gap.cpu(), log_ratio.cpu(), fate.cpu())
