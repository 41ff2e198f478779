"""A chart that the page draws and that can be a PNG, and how charts look in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt

PNG_SCALE = 2.0  # pixels of a PNG by pixel of the chart
WIDTH = 640  # of a PNG's plot, pixels of the chart

# Okabe and Ito's colours, told apart by people who see fewer of them, and the same lightened for a dark ground
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#3B9BD1", "#5B5B5B")
DARK = ("#56B4E9", "#F0904D", "#3CCBA0", "#E3A1C6", "#E6C229", "#9AD0F0", "#B9B9B9")


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart. `id`: also the name of its PNG; `title`: what it shows; `says`: what is seen in it, for those who do not see it.

    `note`: how to read it, in a sentence or two.
    """

    id: str
    title: str
    says: str
    chart: alt.TopLevelMixin
    note: str = ""

    def spec(self, *, validate: bool = False) -> dict[str, Any]:
        """Returns the chart in Vega-Lite's language, as wide as its place; colours are the page's.

        `validate`: compare it with the language's schema first, which takes ten times as long.
        """
        spec: dict[str, Any] = self.chart.to_dict(validate=validate)
        spec.pop("config", None)
        spec["autosize"] = {"type": "fit-x", "contains": "padding"}
        return {**spec, "width": "container", "description": f"{self.title}. {self.says}"}

    def png(self) -> bytes:
        """Returns the chart with its title as a PNG on a white ground. Nothing is loaded from anywhere."""
        import vl_convert

        title = {"text": self.title, "anchor": "start", "fontSize": 14}
        spec = {**self.spec(), "width": WIDTH, "title": title, "config": theme(dark=False), "background": "white", "padding": 12}
        image: bytes = vl_convert.vegalite_to_png(spec, scale=PNG_SCALE, allowed_base_urls=[])
        return image


def theme(*, dark: bool) -> dict[str, Any]:
    """Returns Vega's configuration for a light or a dark ground."""
    text, line, grid = ("#e4e6ea", "#8a909a", "#343a44") if dark else ("#1c2026", "#6b7280", "#e3e6ea")
    words = {"labelColor": text, "titleColor": text, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "range": {"category": list(DARK if dark else LIGHT)},
        "axis": {**words, "domainColor": line, "tickColor": line, "gridColor": grid},
        "legend": {**words, "orient": "bottom", "title": None, "labelLimit": 320, "columns": 4, "symbolOpacity": 1},
        "header": words,
        "title": {"color": text},
        "mark": {"color": (DARK if dark else LIGHT)[0]},
        "rule": {"color": line},
        "text": {"color": text},
    }


def rows(values: Iterable[Mapping[str, Any]]) -> alt.InlineData:
    """Returns rows as a chart's data; numbers are rounded to seven digits, which no eye and no tooltip misses."""
    return alt.InlineData(values=[{key: _short(value) for key, value in row.items()} for row in values])


def _short(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def height(chart: Any, pixels: int = 220) -> Any:
    """Returns a chart with the height that all of the page's have."""
    return chart.properties(height=pixels)
