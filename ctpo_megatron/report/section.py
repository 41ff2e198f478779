"""A part of the report's page, whoever makes it."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under a heading of its own.

    `id` is what links go to, `title` the heading, `html` what stands below it. Text that comes from a run is escaped by whoever
    makes the section. `styles` and `scripts` are plain CSS and JavaScript that the page needs once; no address of any network
    stands in them. `quiet` sections are folded until somebody opens them.
    """

    id: str
    title: str
    html: Markup
    styles: str = ""
    scripts: str = ""
    quiet: bool = False
