"""The site's navigation, read off the index page: its sections, and the pages that the lists in them link to."""

from __future__ import annotations

import re

SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^- \[([^\]]+)\]\(([^)#:]+)\.md\)", re.MULTILINE)


def entries(text: str) -> dict[str, list[tuple[str, str]]]:
    """By section, its pages in their order: what the link says, and the page relative to the index without `.md`."""
    return {caption: ENTRY.findall(body) for caption, body in SECTION.findall(text)}


def tables(text: str) -> str:
    """The same as tables of contents for Sphinx, one for each section."""
    found = ""
    for caption, pages in entries(text).items():
        lines = "\n".join(f"{title} <{page}>" for title, page in pages)
        found += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{lines}\n```\n"
    return found
