"""Writes docs/configuration.md: every key of a run's configuration, from the types and docstrings in ctpo_megatron/config.

.venv/bin/python tools/config_reference.py
"""

from __future__ import annotations

import types
import typing
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.base import Section
from ctpo_megatron.config.descriptions import descriptions
from ctpo_megatron.config.explain import sections_in, type_name

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEAD = """# Configuration

Every key of a run's YAML file, written by `tools/config_reference.py` from the source in `ctpo_megatron/config`.

- Unknown keys are refused, with the nearest known one named. All mistakes are reported at once.
- On the command line: `ctpo train CONFIG dotted.key=value ...`; values are YAML, and the last one wins.
- `${dotted.key}` stands for the value of another key.
- A path may begin with `~` or `~user`, for a home directory.
- `extends: other.yaml` starts from another file, named relative to this one; the keys of this file go on top.
- Where a section has a `type`, changing it starts that section anew. A section without `type` keeps that of its default.
- `RUN_DIR/config.yaml` holds the configuration of a run with every default written out, and can be run again.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD, _section("Top level", "", RunConfig)]
    parts += list(_below(RunConfig, "", {}))
    return "\n".join(parts)


def _below(section: type[Section], prefix: str, seen: dict[type[Section], str]) -> typing.Iterator[str]:
    """The sections in a section, each before those that are in it. `seen`: where a section has stood; it is not told twice."""
    for name, field in section.model_fields.items():
        new: list[type[Section]] = []
        again: list[type[Section]] = []
        for option in sections_in(field.annotation):
            (again if option in seen else new).append(option)
            seen.setdefault(option, f"{prefix}{name}")
        several = len(new) + len(again) > 1
        for option in new:
            kind = f", `type: {type_name(option)}`" if several else ""
            yield _section(f"`{prefix}{name}`{kind}", f"{prefix}{name}", option)
        if again:
            yield _told(f"{prefix}{name}", again, seen)
        for option in new:
            yield from _below(option, f"{prefix}{name}.", seen)


def _told(dotted: str, options: list[type[Section]], seen: dict[type[Section], str]) -> str:
    """What stands for sections that are told elsewhere."""
    kinds = [f"`type: {type_name(option)}`" for option in options if type_name(option)]
    places = " and ".join(sorted({f"`{seen[option]}`" for option in options}))
    return "\n".join([f"## `{dotted}`, {', '.join(kinds)}" if kinds else f"## `{dotted}`", "", f"As {places} above.", ""])


def _section(title: str, dotted: str, section: type[Section]) -> str:
    rows = [f"## {title}", "", _clean(section.__doc__ or ""), "", "| key | values | default | |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        description = descriptions(section).get(name, "")
        if sections_in(field.annotation) and not description:
            note = f"see `{dotted + '.' if dotted else ''}{name}` below"
        else:
            note = _clean(description)
        rows.append(f"| `{name}` | {values(field)} | {_default(field)} | {note} |")
    return "\n".join([*rows, ""])


def values(field: FieldInfo) -> str:
    """What a field allows, in words: `whole number >= 1 or null`."""
    return _words(field.annotation, field.metadata).replace("|", "\\|")


def _words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is dict:
        return f"names, each with {'a section' if sections_in(args[1]) else _words(args[1])}"
    if sections_in(annotation):
        none = " or null" if type(None) in args else ""
        return "section" + none
    if origin is typing.Annotated:
        return _words(args[0], args[1:])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(arg, metadata) for arg in args)
    if origin is Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple:
        return f"list of {_words(args[0])}"
    names = {
        int: "whole number",
        float: "number",
        bool: "true, false",
        str: "text",
        type(None): "null",
        date: "date",
        Any: "any value",
    }
    plain = names[annotation]
    return plain + _bounds(metadata) if annotation in (int, float) else plain


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> str:
    signs = {annotated_types.Gt: (">", "gt"), annotated_types.Ge: (">=", "ge"), annotated_types.Lt: ("<", "lt")}
    signs[annotated_types.Le] = ("<=", "le")
    found = [f" {signs[type(item)][0]} {getattr(item, signs[type(item)][1])}" for item in metadata if type(item) in signs]
    return ",".join(found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.default
    if isinstance(default, Section):
        return f"type `{name}`" if (name := type_name(type(default))) else ""
    shown = {None: "null", True: "true", False: "false", (): "[]"}
    return f"`{shown[default] if isinstance(default, bool | tuple | None) and default in shown else default}`"


def _clean(text: str) -> str:
    """One line of Markdown; what is not code keeps its asterisks."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("*", "\\*") for index, part in enumerate(parts))


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"{PAGE.name}: {render().count(chr(10))} lines")
