"""What each part of a report is: a section of the page, its figures, its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ctpo_megatron.report.figures.figure import Figure
from ctpo_megatron.report.page.render import render
from ctpo_megatron.report.section import Section


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the report. `numbers`: JSON values; `figures` stand in the section by their ids."""

    section: Section
    figures: tuple[Figure, ...]
    numbers: Mapping[str, Any]


def part(
    id: str,
    title: str,
    *,
    prefix: str,
    figures: Iterable[Figure | None] = (),
    numbers: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **values: Any,
) -> Part:
    """Returns the part whose template is called as `id`; it is given the figures that there are, the numbers, and `values`.

    `prefix`: what its ids begin with, so that several runs have room on one page.
    """
    there = tuple(each for each in figures if each is not None)
    drawn = {each.id: drawing(each, prefix) for each in there}
    html = render(id, prefix=prefix, figures=drawn, numbers=numbers or {}, **values)
    return Part(Section(f"{prefix}{id}", title, html, quiet=quiet), there, numbers or {})


def drawing(figure: Figure, prefix: str) -> Markup:
    """Returns the place of a figure on the page; the page's script draws the chart of that key."""
    return render("figure", figure=figure, key=f"{prefix}{figure.id}")
