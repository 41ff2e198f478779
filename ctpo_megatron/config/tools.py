"""What executes the code that a model wrote."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ctpo_megatron.config.base import Section

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


Tool = Annotated[PythonTool | NotebookTool | CalculatorTool, Field(discriminator="type")]
"""Which code of an answer is run, and by what."""
