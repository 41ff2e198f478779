"""What the trainer goes on as when nodes are missing: smaller layouts, and how long the preferred one is waited for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, NonNegativeFloat, PositiveInt, ValidationError

from ctpo_megatron.config.base import Section
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import near_miss

Changes = Mapping[str, int | None]  # keys of `parallel`, with other values


def _known_keys(changes: dict[str, PositiveInt | None]) -> dict[str, PositiveInt | None]:
    known = [name for name in ParallelConfig.model_fields if not name.startswith("overlap_")]  # which are no sizes
    for key in changes:
        if key not in known:
            guess = near_miss(key, known)
            raise ValueError(f"unknown key {key!r}.{guess} Allowed are the sizes of `parallel`: {', '.join(known)}")
    return changes


class ElasticConfig(Section):
    """Other layouts of the trainer, for when nodes are lost for good. docs/operations.md has what happens then."""

    layouts: tuple[Annotated[dict[str, PositiveInt | None], AfterValidator(_known_keys)], ...] = ()
    """What the trainer may go on as where there is no room for `parallel`, the best first: changes to it, such as {dp: 1}. Each
    has fewer ranks than the one before. []: the run waits for cluster.start_timeout_s, and then ends."""
    wait_s: NonNegativeFloat = 60.0
    """How long there has to be no room for `parallel` before a smaller layout is taken; Ray is given five seconds at least."""


def changed_layouts(parallel: ParallelConfig, layouts: tuple[Changes, ...]) -> list[ParallelConfig]:
    """Returns `parallel` with each set of changes. Raises ValueError, which names the key, for one that is no smaller layout."""
    found, before, name = [], parallel, "parallel"
    for index, changes in enumerate(layouts):
        try:
            layout = ParallelConfig.model_validate({**parallel.model_dump(), **changes})
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join([layout_key(index), *map(str, wrong["loc"])])
            raise ValueError(f"{where}: {wrong.get('ctx', {}).get('error', wrong['msg'])}") from error
        if layout.world_size >= before.world_size:
            raise ValueError(
                f"{layout_key(index)} has tp*pp*cp*dp={layout.world_size} ranks, and {name} has {before.world_size}; each layout "
                "must have fewer than the one before, or there is never room for it alone"
            )
        found.append(layout)
        before, name = layout, layout_key(index)
    return found


def layout_key(index: int) -> str:
    """Returns the key of a layout, as it is written in messages."""
    return f"elastic.layouts[{index}]"


def as_written(message: str, index: int, changes: Changes) -> str:
    """Returns a message about keys of `parallel` as one about a layout: keys that it changes are those of the layout."""

    def own(found: re.Match[str]) -> str:
        return f"{layout_key(index)}.{found[1]}" if found[1] in changes else found[0]

    words = re.sub(r"\bparallel\.(\w+)", own, message)
    return words if layout_key(index) in words else f"{layout_key(index)}: {words}"
