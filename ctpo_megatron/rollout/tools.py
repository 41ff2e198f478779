"""Which code of an answer is run, and by what."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ctpo_megatron.config.tools import CalculatorTool, NotebookTool, RemoteTool, Tool
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.rollout.calculator import Calculator
from ctpo_megatron.rollout.protocols import PastCall, ToolRunner, ToolSessions
from ctpo_megatron.rollout.sandbox import BubblewrapPython, Notebooks, require_confinement, sandbox_available
from ctpo_megatron.rollout.sandbox.remote import RemotePython, require_service

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"^[ \t]*```python[ \t]*\r?\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def extract_code(text: str) -> str | None:
    r"""Code of the last closed ```python block of an assistant's turn; None without one, or where \boxed{} follows it."""
    blocks = list(_BLOCK.finditer(text))
    if not blocks or "\\boxed{" in text[blocks[-1].end() :]:
        return None
    return blocks[-1].group(1)


@asynccontextmanager
async def opened(tool: ToolRunner, past: Sequence[PastCall]) -> AsyncIterator[ToolRunner]:
    """`tool` as one attempt uses it, closed on leaving: a session of its own, or the tool itself where it has no sessions.

    `past`: the programs of this attempt that were run before, maybe in another process, in their order.
    """
    if not isinstance(tool, ToolSessions):
        yield tool
        return
    async with tool.session(past) as session:
        yield session


def make_tool(config: Tool | None) -> ToolRunner | None:
    """The tool that `config` asks for, None for none.

    Where bubblewrap does not work, `fallback: calculator` gives the calculator and one warning; `fallback: error` raises
    ConfigError. So does a bubblewrap that works and does not hold, whatever the fallback: the escape test is made here. So does a
    remote sandbox that does not answer.
    """
    if config is None:
        return None
    if isinstance(config, CalculatorTool):
        return Calculator(config.max_output_chars)
    if isinstance(config, RemoteTool):
        require_service(config)
        return RemotePython(config)
    reason = sandbox_available()
    if reason is None:
        require_confinement(config)
        return Notebooks(config) if isinstance(config, NotebookTool) else BubblewrapPython(config)
    if config.fallback == "calculator":
        log.warning("No Python tool: %s Using the calculator instead, which evaluates arithmetic only.", reason)
        return Calculator(config.max_output_chars)
    raise ConfigError(
        f"rollout.tool: the Python tool cannot run here. {reason} Or set rollout.tool.fallback=calculator, "
        "rollout.tool.type=calculator (arithmetic only, executes nothing), or rollout.tool=null (single-turn)."
    )
