"""How `make docs` makes pages of the Markdown files. They are read where they are, so a link works here and on GitHub alike."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
from navigation import tables

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
html_static_path = ["style.css"]
html_css_files = ["style.css"]


def setup(app: Sphinx) -> None:
    """Gives the index page its navigation, which GitHub shows as what it is made from: links."""

    def read(_app: Sphinx, page: str, source: list[str]) -> None:
        if page == root_doc:
            source[0] += tables(source[0])

    app.connect("source-read", read)
