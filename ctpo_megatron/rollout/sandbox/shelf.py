"""Notebooks that a service keeps for attempts elsewhere, by names that only their clients know.

A client says of each program which one of its notebook it is, so none is run twice in one notebook: a program that is sent again
gets the answer that it got. A notebook that is not known here (the service was started again, or nobody used it for long) is made
anew from the programs that its client sends then (`notebook`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ctpo_megatron.config.tools import ConfinedPython
from ctpo_megatron.rollout.protocols import ToolResult
from ctpo_megatron.rollout.sandbox.notebook import NotebookSession
from ctpo_megatron.rollout.sandbox.remote import Cell

IDLE_S = 900.0  # after which a notebook that nobody used is closed
MOST_NOTEBOOKS = 4096


class UnknownNotebook(Exception):
    """It is not here, or not where its client takes it to be."""


class NoRoomForNotebook(Exception):
    """As many are open as may be."""


@dataclass(slots=True)
class _Kept:
    session: NotebookSession
    number: int  # of programs that it has run
    timer: asyncio.TimerHandle
    code: str = ""  # the newest of them
    result: ToolResult | None = None  # and what it said
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Shelf:
    """All notebooks of a service; their programs take `slots`."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots = slots
        self._kept: dict[str, _Kept] = {}

    async def run(self, cell: Cell, code: str, config: ConfinedPython) -> ToolResult:
        """What `code` says in the notebook that `cell` names. Raises UnknownNotebook, NoRoomForNotebook, RolloutError."""
        kept = self._kept.get(cell.notebook) or self._open(cell, config)
        async with kept.turn:
            try:
                return await self._next(kept, cell, code)
            finally:
                kept.timer.cancel()
                if self._kept.get(cell.notebook) is kept:
                    kept.timer = self._timer(cell.notebook)
                else:  # it was closed meanwhile
                    kept.session.close()

    async def _next(self, kept: _Kept, cell: Cell, code: str) -> ToolResult:
        if self._kept.get(cell.notebook) is not kept:
            raise UnknownNotebook
        if kept.result is not None and (cell.number, code) == (kept.number, kept.code):
            return kept.result
        if cell.number != kept.number + 1:
            self.close(cell.notebook)
            raise UnknownNotebook
        kept.timer.cancel()
        result = await kept.session.run(code)
        kept.number, kept.code, kept.result = cell.number, code, result
        return result

    def close(self, notebook: str) -> None:
        """End one, if it is here; one that runs a program ends after it."""
        kept = self._kept.pop(notebook, None)
        if kept is not None:
            kept.timer.cancel()
            if not kept.turn.locked():
                kept.session.close()

    def close_all(self) -> None:
        """End all."""
        for notebook in list(self._kept):
            self.close(notebook)

    def _open(self, cell: Cell, config: ConfinedPython) -> _Kept:
        if cell.past is None:
            raise UnknownNotebook
        if len(self._kept) >= MOST_NOTEBOOKS:
            raise NoRoomForNotebook
        session = NotebookSession(config, self._slots, cell.past)
        kept = self._kept[cell.notebook] = _Kept(session, len(cell.past), self._timer(cell.notebook))
        return kept

    def _timer(self, notebook: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(IDLE_S, self.close, notebook)
