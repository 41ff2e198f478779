"""What executes the code that a model wrote."""

from __future__ import annotations

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from ctpo_megatron.config.base import FilePath, Section

UNSAID = {"concurrency", "url", "key_file", "retries"}  # settings of tools that change nothing of what they say


class ConfinedPython(Section):
    """The model's ```python blocks, confined by bubblewrap on the driver's node."""

    type: str
    timeout_s: PositiveFloat = 10.0
    """Wall time of one call."""
    memory_mb: PositiveInt = 512
    """Address space of the interpreter."""
    max_output_chars: PositiveInt = 256
    """Longer output is cut in the middle."""
    concurrency: PositiveInt | None = None
    """Programs at a time; others wait. More than there are CPUs, as a program that never ends keeps its place until its time is
    over. null: eight for each CPU of the driver's node, 64 at most, but as many as CPUs at least."""
    fallback: Literal["error", "calculator"] = "error"
    """Where bubblewrap is missing: refuse to start, or use the calculator, which executes nothing."""

    @property
    def at_a_time(self) -> int:
        """Programs at a time on this host."""
        cpus = os.cpu_count() or 1
        return self.concurrency or max(cpus, min(8 * cpus, 64))


class PythonTool(ConfinedPython):
    """Runs the model's ```python blocks confined by bubblewrap, each in an interpreter of its own."""

    type: Literal["python"] = "python"


class NotebookTool(ConfinedPython):
    """Runs the ```python blocks of a trajectory in one interpreter, as confined, so that they see what earlier ones defined."""

    type: Literal["notebook"] = "notebook"


class CalculatorTool(Section):
    """Evaluates the arithmetic of a ```python block by parsing it; executes nothing."""

    type: Literal["calculator"] = "calculator"
    max_output_chars: PositiveInt = 256
    """Longer output is cut in the middle."""


class RemoteTool(Section):
    """Has the model's ```python blocks run by a sandbox elsewhere, `ctpo serve-sandbox`, which confines as `python` does."""

    type: Literal["remote"] = "remote"
    url: str
    """Where it listens, such as http://10.0.0.7:8300."""
    key_file: FilePath
    """A file with the key that it asks for."""
    timeout_s: PositiveFloat = 10.0
    """Wall time of one call there. Waiting for a place is not part of it."""
    memory_mb: PositiveInt = 512
    """Address space of the interpreter."""
    max_output_chars: PositiveInt = 256
    """Longer output is cut in the middle."""
    notebook: bool = False
    """Whether the programs of a trajectory run in one interpreter, as those of `notebook` do."""
    concurrency: PositiveInt = 64
    """Programs that are sent at a time; others wait."""
    retries: NonNegativeInt = 5
    """How often a program is sent again where no usable answer came. It may have been run before, which does no harm: nothing
    that a program does outlives it, and a notebook runs none twice. Then its attempt fails, and rollout.retries counts."""

    @field_validator("url")
    @classmethod
    def _says_where_and_nothing_else(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a sandbox; allowed: http://HOST:PORT or https://HOST:PORT")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("a name, a password or a query in the address would be in logs; the key belongs in key_file")
        return url.rstrip("/")


Tool = Annotated[PythonTool | NotebookTool | RemoteTool | CalculatorTool, Field(discriminator="type")]
"""Which code of an answer is run, and by what."""
