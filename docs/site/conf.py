"""How `make docs` makes pages of the Markdown files. The sources are those of the checkout, so a link works here and there alike."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

project = "ctpo_megatron"
html_title = project
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/**", "examples/README.md", "README.md", "CONTRIBUTING.md"]
exclude_patterns = ["docs/site", "runs", "site", "build", "dist", ".*", "**/__pycache__"]

myst_heading_anchors = 4  # of every heading, by the names that GitHub gives them
myst_disable_syntax = ["myst_block_break", "myst_line_comment", "myst_role", "myst_target"]  # GitHub knows none of them
highlight_language = "none"  # a block without a language is text

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_extra_path = ["index.html"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_domain_indices = False
html_use_index = False
html_baseurl = ""
html_static_path = ["style.css"]
html_css_files = ["style.css"]

SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n)*)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\.md\)")


def navigation(text: str) -> str:
    """The tables of contents for Sphinx: one for each section of the index page, with the pages that it links to, in its order."""
    found = ""
    seen: set[str] = set()
    for caption, body in SECTION.findall(text):
        pages = [page for page in dict.fromkeys(LINK.findall(body)) if page not in seen]
        seen |= set(pages)
        if pages:
            found += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"
    return found


def setup(app: Sphinx) -> None:
    """Gives the index page its navigation, which GitHub shows as what it is made from: links."""

    def read(_app: Sphinx, page: str, source: list[str]) -> None:
        if page == root_doc:
            source[0] += navigation(source[0])

    app.connect("source-read", read)
