"""Lines of events.jsonl as the sentences that the console had: the classes of events say them again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from ctpo_megatron import record
from ctpo_megatron.record.events import Event

SUFFIX = "events"  # of the modules in this package that have classes of events


def sentence(name: str, fields: Mapping[str, Any]) -> str:
    """Returns what the event `name` with these `fields` says; its fields, or else its name, where its class is not known or has
    others."""
    kind = _kinds().get(name)
    if kind is not None:
        own = {each.name for each in dataclasses.fields(kind)}
        known = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items() if key in own}
        with contextlib.suppress(Exception):  # another release wrote it, or somebody else: it is shown as it is
            return kind(**known).sentence
    return ", ".join(f"{key} {value}" for key, value in fields.items()) or name


@functools.cache
def _kinds() -> dict[str, type[Event]]:
    for module in pkgutil.iter_modules(record.__path__):
        if module.name.endswith(SUFFIX) and module.name != "tfevents":
            importlib.import_module(f"{record.__name__}.{module.name}")
    return {kind.name: kind for kind in _below(Event) if isinstance(getattr(kind, "name", None), str)}


def _below(kind: type[Event]) -> Iterator[type[Event]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)
