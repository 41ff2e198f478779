"""Counts by a bin and by what became of them."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt

from ctpo_megatron.report.figures.figure import Figure, height, rows


def shares(id: str, title: str, axis: str, table: Mapping[str, Mapping[str, int]]) -> Figure | None:
    """Returns the shares of each end in each bin, one beside the other; None where nothing was counted.

    `table`: bin to end to how many.
    """
    values = [
        {"bin": name, "end": end, "groups": count, "share": count / total}
        for name, counts in table.items()
        if (total := sum(counts.values()))
        for end, count in counts.items()
    ]
    if not values:
        return None
    chart = (
        alt.Chart(rows(values))
        .mark_bar()
        .encode(
            x=alt.X("share:Q", title="share of the groups", axis=alt.Axis(format=".0%"), scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("bin:N", title=axis, sort=None),
            color=alt.Color("end:N", sort=None),
            order=alt.Order("place:Q"),
            tooltip=["bin:N", "end:N", alt.Tooltip("groups:Q", format=","), alt.Tooltip("share:Q", format=".1%")],
        )
        .transform_calculate(place="indexof(['trained', 'filtered', 'failed', 'aborted'], datum.end)")
    )
    words = "; ".join(
        f"{name}: {counts.get('trained', 0):,} of {sum(counts.values()):,} trained on" for name, counts in table.items()
    )
    return Figure(id, title, words, height(chart, max(24 * len(table) + 10, 90)))
