"""A page of the documentation, read as GitHub reads it: its anchors, links, code blocks and words in backticks, with lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
READER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its first words, what is written behind the fence, and its text."""

    line: int
    info: str
    text: str


@dataclass
class Page:
    """A file of Markdown. Links, spans and blocks are in the order of the page; a line is that of the paragraph or row."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[tuple[int, str]] = field(default_factory=list)
    spans: list[tuple[int, str]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def at(self, line: int) -> str:
        """A place of it as a person would name it."""
        return f"{self.path.relative_to(ROOT)}:{line}"


def pages() -> list[Path]:
    """All pages of the project: docs/ with what is below it, and the three beside it."""
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def read_page(path: Path, text: str | None = None) -> Page:
    """The page at `path`, or what it would be with this `text`."""
    page = Page(path)
    tokens = READER.parse(path.read_text(encoding="utf-8") if text is None else text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        line = (token.map or [0])[0] + 1
        if token.type == "fence":
            page.blocks.append(Block(line + 1, token.info.strip(), token.content))
        elif token.type == "inline":
            children = token.children or []
            page.links += [(line, target) for child in children if (target := _target(child))]
            page.spans += [(line, child.content) for child in children if child.type == "code_inline"]
            if before is not None and before.type == "heading_open":
                page.anchors.add(_free(_anchor(children), page.anchors))
    return page


def _target(token: Token) -> str:
    """Where a link or a picture points to, empty for other tokens."""
    return str(token.attrGet({"link_open": "href", "image": "src"}.get(token.type, "")) or "")


def _anchor(heading: list[Token]) -> str:
    """What GitHub calls a heading: its letters in lower case, blanks as hyphens, no other marks."""
    words = "".join(token.content for token in heading if token.type in ("text", "code_inline"))
    return re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where the page has one like it before."""
    numbered = (f"{name}-{number}" if number else name for number in range(len(taken) + 1))
    return next(each for each in numbered if each not in taken)
