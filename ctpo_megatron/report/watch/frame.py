"""One frame: the parts one below the other, in two columns where there is room, cut to the height that there is."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ctpo_megatron.report.watch import panels
from ctpo_megatron.report.watch.view import View
from ctpo_megatron.report.watch.words import plain

TWO_COLUMNS = 130  # characters from which on
ALL = 1000
FEWEST_CURVES, FEWEST_EVENTS, FEWEST_SERVERS = 3, 3, 3


@dataclass(frozen=True, slots=True)
class Frame:
    """A view as it is now. `whole`: as high as it gets; otherwise it fits the height of the terminal."""

    view: View
    whole: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if self.whole:
            yield self._made(width, ALL, ALL, 10)
            return
        height = options.height or console.size.height
        servers, curves, events = ALL, len(panels.CURVES), FEWEST_EVENTS

        def excess() -> int:
            lines = console.render_lines(self._made(width, servers, curves, events), options.update(height=None), pad=False)
            return len(lines) - height

        if (over := excess()) > 0:
            servers = max(FEWEST_SERVERS, self._servers - over)
            over = excess()
        if over > 0:
            curves = max(FEWEST_CURVES, self._curves - over)
            over = excess()
        events = max(0, events - over)
        yield self._made(width, servers, curves, events)

    @property
    def _servers(self) -> int:
        return 0 if self.view.present is None else len(self.view.present.servers)

    @property
    def _curves(self) -> int:
        return len(panels.drawn(self.view))

    def _made(self, width: int, servers: int, curves: int, events: int) -> RenderableType:
        view = self.view
        column = (width - 6) // 2 if width >= TWO_COLUMNS else width
        left = Group(*_present(panels.curves(view, curves), panels.phases(view, column)))
        right = Group(*_present(panels.servers(view, servers), panels.trainer(view), panels.ledger(view)))
        problem = Text(plain(view.problem), "red")
        below = _present(panels.alarms(view), panels.events(view, events), problem)
        if width < TWO_COLUMNS:
            return Group(panels.head(view), left, right, *below)
        columns = Table.grid(padding=(0, 3, 0, 0), expand=True)
        columns.add_column(ratio=1)
        columns.add_column(ratio=1)
        columns.add_row(left, right)
        return Group(panels.head(view), columns, *below)


def _present(*parts: RenderableType) -> list[RenderableType]:
    """Returns the parts that say something."""
    return [part for part in parts if not isinstance(part, Text) or part.plain]
