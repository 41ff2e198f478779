"""Which code of an answer is run, and by what."""

from __future__ import annotations

import logging
import re

from ctpo_megatron.config.tools import CalculatorTool, Tool
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.rollout.calculator import Calculator
from ctpo_megatron.rollout.protocols import ToolRunner
from ctpo_megatron.rollout.sandbox import BubblewrapPython, require_confinement, sandbox_available

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"^[ \t]*```python[ \t]*\r?\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def extract_code(text: str) -> str | None:
    r"""Code of the last closed ```python block of an assistant's turn; None without one, or where \boxed{} follows it."""
    blocks = list(_BLOCK.finditer(text))
    if not blocks or "\\boxed{" in text[blocks[-1].end() :]:
        return None
    return blocks[-1].group(1)


def make_tool(config: Tool | None) -> ToolRunner | None:
    """The tool that `config` asks for, None for none.

    Where bubblewrap does not work, `fallback: calculator` gives the calculator and one warning; `fallback: error` raises
    ConfigError. So does a bubblewrap that works and does not hold, whatever the fallback: the escape test is made here.
    """
    if config is None:
        return None
    if isinstance(config, CalculatorTool):
        return Calculator(config.max_output_chars)
    reason = sandbox_available()
    if reason is None:
        require_confinement(config)
        return BubblewrapPython(config)
    if config.fallback == "calculator":
        log.warning("No Python tool: %s Using the calculator instead, which evaluates arithmetic only.", reason)
        return Calculator(config.max_output_chars)
    raise ConfigError(
        f"rollout.tool: the Python tool cannot run here. {reason} Or set rollout.tool.fallback=calculator, "
        "rollout.tool.type=calculator (arithmetic only, executes nothing), or rollout.tool=null (single-turn)."
    )
