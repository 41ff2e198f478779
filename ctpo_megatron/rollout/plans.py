"""How the steps of a run were made before, for a run that makes them again: the journal's records of compositions."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.record.segments import Place
from ctpo_megatron.types import Composition, Fate


class Plans:
    """The newest composition of each step, with the digest of the weights that it trains and where its record is.

    They hold until weights are published that are others than then; the steps from there on are made anew.
    """

    def __init__(self) -> None:
        self._steps: dict[int, tuple[Composition, str, Place]] = {}
        self._fates: dict[int, Fate] = {}

    def add(self, made: Composition, digest: str, place: Place) -> None:
        """Take up how a step is made. Where it was made otherwise before, that and what followed from it are forgotten."""
        known = self.planned(made.step)
        if known is None or _groups(known) != _groups(made):
            self.drop(made.step)
        self._steps[made.step] = made, digest, place
        self._fates |= made.fates

    def planned(self, step: int) -> Composition | None:
        """Returns how `step` was made (`loop.protocols.Decisions`)."""
        known = self._steps.get(step)
        return None if known is None else known[0]

    def fate(self, group: int) -> Fate | None:
        """Returns what became of a group (`loop.protocols.Decisions`)."""
        return self._fates.get(group)

    def published(self, version: int, digest: str) -> None:
        """Note which weights `version` is."""
        known = self._steps.get(version)
        if known is not None and known[1] != digest:
            self.drop(version)

    def drop(self, step: int) -> None:
        """Forget how `step` and those after it were made."""
        self._steps = {each: kept for each, kept in self._steps.items() if each < step}
        self._fates = {group: fate for group, fate in self._fates.items() if fate.step < step}

    def forget(self, step: int) -> None:
        """Forget how the steps before `step` were made: nothing goes back to them."""
        self._steps = {each: kept for each, kept in self._steps.items() if each >= step}
        self._fates = {group: fate for group, fate in self._fates.items() if fate.step >= step}

    def paths(self) -> set[Path]:
        """Returns the files that hold them."""
        return {place.path for _, _, place in self._steps.values()}


def _groups(made: Composition) -> tuple[object, ...]:
    return made.trained, made.admitted, {group: fate.end for group, fate in made.fates.items()}
