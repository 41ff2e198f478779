"""The configuration, the environment of the processes, and what changed between incarnations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ctpo_megatron.record.elastic_events import LayoutTaken
from ctpo_megatron.record.events import SettingDiffers, SettingsUnknown
from ctpo_megatron.record.story import Incarnation
from ctpo_megatron.report.parts.part import Part, part
from ctpo_megatron.report.reading.happenings import sentence
from ctpo_megatron.report.reading.run import Run

ORIGIN = ("version", "commit", "host", "job", "command")


def settings(run: Run, prefix: str) -> Part:
    """Returns how a run was set up, and each change of that."""
    incarnations = run.story.incarnations
    first = incarnations[0].began.fields if incarnations else {}
    changes = [
        change for place, each in enumerate(incarnations) for change in _changes(each, incarnations[place - 1] if place else None)
    ]
    origin = {name: _words(first.get(name)) for name in ORIGIN if first.get(name) is not None}
    processes = {who: values for who, values in run.environment.items() if isinstance(values, Mapping)}
    variables = [
        {"who": who, "name": name, **_variable(value)} for who, values in processes.items() for name, value in values.items()
    ]
    numbers = {"config": run.config, "environment": run.environment, "origin": origin, "changes": changes}
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else ""
    return part(
        "settings",
        "Configuration, environment, changes",
        prefix=prefix,
        numbers=numbers,
        text=text,
        origin=origin,
        changes=changes,
        variables=variables,
    )


def _changes(one: Incarnation, before: Incarnation | None) -> list[dict[str, Any]]:
    """Returns what is other in an incarnation than in the one before it, and what changed in its course."""
    found = []
    if before is not None:
        old, new = before.began.fields, one.began.fields
        for name in ORIGIN:
            if old.get(name) != new.get(name):
                found.append({"key": name, "before": _words(old.get(name)), "now": _words(new.get(name)), "meaning": ""})
    for event in one.events:
        if event.name == SettingDiffers.name:
            found.append({key: _words(event.fields.get(key)) for key in ("key", "before", "now", "meaning")})
        if event.name in (SettingsUnknown.name, LayoutTaken.name):
            found.append({"key": event.name, "before": "", "now": "", "meaning": sentence(event)})
    return [{"incarnation": one.number, **each} for each in found]


def _words(value: Any) -> str:
    if value is None:
        return "–"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _variable(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {"value": _words(value.get("value")), "why": _words(value.get("why"))}
    return {"value": _words(value), "why": ""}
