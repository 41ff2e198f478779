"""What pages of the documentation say of commands and of the configuration that `ctpo` would refuse. Nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typer.exceptions import TyperException
from typer.main import get_command

from ctpo_megatron import cli
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.explain import dotted_keys
from ctpo_megatron.config.load import load_config
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.slurm.site import read_site
from tests.support.page_faults import is_there
from tests.support.pages import ROOT, Page

BASE = ROOT / "configs" / "quickstart.yaml"  # what a part of a configuration is a part of
COMMAND = re.compile(r"^\s*(?:\$ )?(?:[A-Z_]+=\S* )*(?:\S+/)?(ctpo .*)$")
BEHIND = re.compile(r" {2,}| #| \| | > ")  # where a command ends and words about it or another program begin
OPTIONAL = re.compile(r"\[((?:--)?[a-z][\w.-]*(?:[ =][^\[\]]*)?)\](?=[ \]]|$)")
KEY = re.compile(r"([a-z_]+(?:\.[a-z_][a-z_0-9]*)+)(?:=.*)?")


def commands(page: Page) -> Iterator[tuple[int, str]]:
    """The `ctpo` commands of blocks without a language, one line each, without what comes after them."""
    for block in page.blocks:
        if block.info not in ("", "bash", "sh"):
            continue
        lines = block.text.split("\n")
        for number, line in enumerate(lines):
            whole, rest = line, iter(lines[number + 1 :])
            while whole.endswith("\\"):
                whole = f"{whole[:-1].rstrip()} {next(rest, '').strip()}"
            if found := COMMAND.match(whole):
                yield block.line + number, BEHIND.split(found[1])[0]


def words_of(command: str) -> list[str]:
    """A command's words after `ctpo`. What is in brackets may be left out and is taken; of `a|b` the first is."""
    plain = command.replace(" ...", "")
    while OPTIONAL.search(plain):
        plain = OPTIONAL.sub(r"\1", plain)
    return [re.sub(r"^([a-z]+)\|[a-z|]+$", r"\1", word) for word in shlex.split(plain)][1:]


@cache
def ctpo() -> Any:
    """The command `ctpo` as its parser knows it."""
    return get_command(cli.app)


def chosen(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and those that are left. Raises ValueError."""
    command, left = ctpo(), [word for word in words if word != cli.DEBUG]
    while hasattr(command, "commands") and left:
        name, *left = left
        if name not in command.commands:
            raise ValueError(f"there is no command {name!r}")
        command = command.commands[name]
    return command, left


def try_settings(values: dict[str, Any]) -> None:
    """Reads the configuration that parsed words name, with their overrides. Raises ConfigError.

    One that is no file of this project stands for the user's own; the quickstart's takes its place.
    """
    overrides = [word for word in values.get("overrides") or [] if not re.match(r"key=|[a-z.]+\.KEY=", word)]
    file = ROOT / str(values.get("config", ""))
    if file.is_file() or overrides:
        load_config(file if file.is_file() else BASE, overrides)


def wrong_commands(page: Page) -> Iterator[str]:
    """Commands that `ctpo` refuses: names, options, missing words, by its own parser; and settings that no run can have."""
    for line, text in commands(page):
        try:
            command, words = chosen(words_of(text))
            try_settings(command.make_context(command.name, cli._with_mode(words)).params)
        except TyperException as error:
            yield f"{page.at(line)}: {text}: {error}"
        except ValueError as error:
            yield f"{page.at(line)}: {text}: {error}"
    for line, text in page.spans:
        if text.startswith("ctpo ") and (why := unknown_word(text)):
            yield f"{page.at(line)}: {text}: {why}"


def unknown_word(text: str) -> str | None:
    """What of a command in running text `ctpo` has not: its name or an option. Words may be missing there, and abbreviated."""
    try:
        command, words = chosen(words_of(text))
    except ValueError as error:
        return str(error)
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    return f"no such option: {unknown[0]}" if unknown else None


def wrong_yaml(page: Page) -> Iterator[str]:
    """YAML that is no part of a configuration; after `yaml site`, none of a site's options."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "block.yaml"
        for block in page.blocks:
            if not block.info.startswith("yaml"):
                continue
            try:
                if block.info == "yaml site":
                    file.write_text(block.text, encoding="utf-8")
                    read_site(file)
                else:
                    file.write_text(f"extends: {BASE}\n{block.text}", encoding="utf-8")
                    load_config(file)
            except ConfigError as error:
                yield f"{page.at(block.line)}: {str(error).replace(f'{file}: ', '')}"


def missing_keys(page: Page) -> Iterator[str]:
    """Words in backticks that look like a key of the configuration, and are neither one nor a module."""
    keys = frozenset(dotted_keys())
    for line, span in page.spans:
        found = KEY.fullmatch(span)
        if found and not span.endswith(".json") and found[1].partition(".")[0] in RunConfig.model_fields and found[1] not in keys:
            module = f"ctpo_megatron.{found[1]}".rpartition(".")
            if not is_there(f"ctpo_megatron.{found[1]}", "") and not (is_there(module[0], "") and is_there(module[0], module[2])):
                yield f"{page.at(line)}: `{span}`: there is no such key"
