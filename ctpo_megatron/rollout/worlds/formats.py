"""How a model writes calls of tools, by what its chat template says."""

from __future__ import annotations


def call_format(template: str) -> str:
    """Returns the name of the format that a chat template shows its model; hermes where it shows none."""
    if "<function=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"  # Qwen's too: it reads calls with and without a newline behind the tag
    if "<|python_tag|>" in template or '"parameters":' in template:
        return "llama3"
    return "hermes"
