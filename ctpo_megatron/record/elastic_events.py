"""Events about the nodes that the trainer is on, and the layout that it goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctpo_megatron.record.events import Event


@dataclass(frozen=True, slots=True)
class NodesLost(Event):
    """Nodes with ranks of the trainer are gone; places are sought for all ranks, on the other nodes."""

    name: ClassVar[str] = "nodes lost"
    nodes: tuple[str, ...]  # their addresses
    within_s: float  # how long the preferred layout is waited for
    smaller: bool  # whether there is a smaller one to go on with

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        then = ", then a smaller layout is taken" if self.smaller else ""
        return f"gone, with ranks of the trainer: {', '.join(self.nodes)}. Room is sought for up to {self.within_s:.0f} s{then}"


@dataclass(frozen=True, slots=True)
class LayoutTaken(Event):
    """The trainer has places for a layout: a smaller one, or places that are not those it had."""

    name: ClassVar[str] = "layout"
    layout: dict[str, int | bool | None]  # keys of `parallel` and their values
    ranks: int
    preferred: bool  # it is `parallel`, as the configuration has it
    nodes: tuple[str, ...]  # addresses of those that its ranks are on
    reason: str

    @property
    def sentence(self) -> str:
        """Returns the event for a person, in one line."""
        sizes = " ".join(f"{name}={size}" for name, size in self.layout.items() if name in ("tp", "pp", "cp", "dp"))
        which = "the preferred layout" if self.preferred else "a smaller layout"
        return f"the trainer has {which}, {sizes}, on {', '.join(self.nodes)}: {self.reason}"
