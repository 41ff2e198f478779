"""What a tool's output looks like to the model."""

from __future__ import annotations


def clip_middle(text: str, limit: int) -> str:
    """`text` without trailing white space, cut in the middle to at most `limit` characters."""
    text = text.rstrip()
    if len(text) <= limit:
        return text
    gap = f"\n... {len(text) - limit} characters cut ...\n"
    if len(gap) >= limit:
        return text[:limit]
    keep = limit - len(gap)
    return text[: keep - keep // 2] + gap + text[len(text) - keep // 2 :]
