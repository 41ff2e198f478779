"""Turns pydantic's errors into lines for a person: where it was written, the key, what was found, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ctpo_megatron.config.base import Section
from ctpo_megatron.config.descriptions import descriptions
from ctpo_megatron.config.run import RunConfig
from ctpo_megatron.config.sources import Source
from ctpo_megatron.errors import near_miss

WORDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "model_attributes_type": "a section of `key: value` lines",
    "none_required": "null",
}
BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def explain(error: ValidationError, sources: list[Source], main: str, root: type[Section] = RunConfig) -> str:
    """One line per mistake in the values of `root`.

    `sources` are ordered from the weakest to the strongest; `main` is the file the user named.
    """
    lines = dict.fromkeys(_line(details, sources, main, root) for details in error.errors())
    return "\n".join(lines)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The config sections that a field's annotation allows: `X`, `X | Y`, `X | None`, Annotated or not."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in get_args(annotation) for section in sections_in(part)]


def type_name(section: type[Section]) -> str | None:
    """The value of `type` that picks this section, None where there is no choice."""
    field = section.model_fields.get("type")
    return None if field is None else field.default


def dotted_keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key below `section`; the options of all types of a union are listed."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in sections_in(field.annotation):
            yield from dotted_keys(inner, f"{prefix}{name}.")


def _line(details: ErrorDetails, sources: list[Source], main: str, root: type[Section]) -> str:
    path, section = _walk(details["loc"], root)
    where = next((source.name for source in reversed(sources) if path and source.holds(path)), main)
    key = _dotted(path)
    return f"{where}: {key}: {_what(details, path, section, root)}" if key else f"{where}: {_what(details, path, section, root)}"


def _walk(loc: tuple[int | str, ...], root: type[Section]) -> tuple[tuple[int | str, ...], type[Section]]:
    """The path as the user wrote it (pydantic adds the names of union members) and the section that holds its last key."""
    section: type[Section] = root
    path: list[int | str] = []
    options: list[type[Section]] = [root]
    for part in loc:
        tags = {type_name(option): option for option in options}
        if len(options) > 1 and part in tags:
            options = [tags[part]]
            continue
        if len(options) == 1:
            section = options[0]
        path.append(part)
        if isinstance(part, int):  # one of a list, which holds the sections that its field allows
            continue
        field = section.model_fields.get(str(part)) if options else None
        options = sections_in(field.annotation) if field is not None else []
    return tuple(path), section


def _what(details: ErrorDetails, path: tuple[int | str, ...], section: type[Section], root: type[Section]) -> str:
    kind, context, found = details["type"], details.get("ctx", {}), _show(details["input"])
    if kind == "extra_forbidden":
        return _unknown_key(str(path[-1]), path[:-1], section, root)
    if kind == "missing":
        return f"missing; it must be given.{_describe(section, str(path[-1]))}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = next(part for part in reversed(path) if isinstance(part, str))  # behind it the place in a list
        return _wrong_type(key, section, details["input"])
    if kind == "literal_error":
        allowed = context["expected"]
        guess = near_miss(str(details["input"]), [word.strip("' ") for word in allowed.replace(" or ", ",").split(",")])
        return f"found {found}; allowed: {allowed}.{guess}"
    if kind in WORDS:
        return f"found {found}; must be {WORDS[kind]}."
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"found {found}; must be {words} {context[bound]:g}."
    if kind == "value_error":
        return f"{context['error']}."
    return f"found {found}; {details['msg']}."


def _unknown_key(key: str, parents: tuple[int | str, ...], section: type[Section], root: type[Section]) -> str:
    allowed = list(section.model_fields)
    chosen = type_name(section)
    own = _dotted((*parents, key))
    elsewhere = dict.fromkeys(dotted for dotted in dotted_keys(root) if dotted.rsplit(".", 1)[-1] == key)
    if own in elsewhere:
        guess = f" It is an option of another type than {chosen!r}."
    else:
        guess = near_miss(key, allowed) or (f" Did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else "")
    parent = _dotted(parents) or "the top level"
    if chosen is not None and parents:
        parent += f" of type {chosen!r}"
    return f"unknown key.{guess} Allowed in {parent}: {', '.join(allowed)}."


def _dotted(path: tuple[int | str, ...]) -> str:
    """`elastic.layouts[0].dp`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _wrong_type(key: str, section: type[Section], found: Any) -> str:
    names = [name for option in sections_in(section.model_fields[key].annotation) if (name := type_name(option))]
    allowed = ", ".join(repr(name) for name in names)
    if not isinstance(found, dict):
        return f"found {_show(found)}; must be a section with a `type`, one of: {allowed}."
    if "type" not in found:
        return f"`type` is missing; allowed: {allowed}."
    return f"type: found {_show(found['type'])}; allowed: {allowed}.{near_miss(str(found['type']), names)}"


def _describe(section: type[Section], key: str) -> str:
    description = descriptions(section).get(key)
    return f" {description}" if description else ""


def _show(value: Any) -> str:
    """A value as a person wrote it, cut to a readable length."""
    if isinstance(value, dict):
        return f"a section with {', '.join(map(str, value)) or 'nothing in it'}"
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
