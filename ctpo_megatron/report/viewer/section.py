"""The trajectory viewer as a section of the report's page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import yaml
from markupsafe import Markup

from ctpo_megatron.report.section import Section
from ctpo_megatron.report.viewer.build import Options, build
from ctpo_megatron.report.viewer.rows import rollout_files
from ctpo_megatron.report.viewer.store import PartStore
from ctpo_megatron.report.viewer.vocabulary import find_vocabulary

_SCRIPTS = ("read.js", "find.js", "tokens.js", "viewer.js")
_NOTHING = Markup("<p>This run wrote no trajectories (RUN_DIR/rollouts, log.save_rollouts).</p>")


def trajectories_section(
    run_dir: Path, page: Path, *, key: str = "trajectories", title: str = "Trajectories", options: Options | None = None
) -> Section:
    """Returns the viewer of a run's trajectories, for the page that will be at `page`.

    `key`: the section's id, and for a page with several runs different for each. What does not fit into the page is written to
    PAGE_files/KEY beside it, where also an earlier call's work is found. Raises StorageError.
    """
    if not rollout_files(run_dir):
        return Section(key, title, _NOTHING, quiet=True)
    directory = page.with_name(f"{page.stem}_files") / key
    store = PartStore(directory)
    build(run_dir, directory, store, find_vocabulary(_tokenizers(run_dir)), options or Options())
    held = "".join(f'<script type="text/plain" data-part="{escape(name)}">{text}</script>' for name, text in store.held.items())
    base = quote(f"{directory.parent.name}/{key}/") if store.beside else ""
    told = f"<noscript>This needs JavaScript.</noscript>{held}"
    html = f'<div class="tv" data-key="{escape(key)}" data-base="{escape(base)}">{told}</div>'
    return Section(key, title, Markup(html), styles=_asset("viewer.css"), scripts=scripts())


def scripts() -> str:
    """Returns the viewer's JavaScript, which is the same for all sections."""
    return "(() => {\n" + '"use strict";\n' + "".join(map(_asset, _SCRIPTS)) + "})();\n"


def _asset(name: str) -> str:
    return files("ctpo_megatron.report.viewer").joinpath("assets", name).read_text(encoding="utf-8")


def _tokenizers(run_dir: Path) -> Iterator[Path]:
    """Yields where the run's tokenizer may be: its model, its checkpoints, what it began from."""
    yield run_dir / "model"
    yield from sorted((run_dir / "checkpoints").glob("step_*/model"), reverse=True)
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    model = config.get("model") if isinstance(config, dict) else None
    path = model.get("path") if isinstance(model, dict) else None
    if isinstance(path, str):
        yield Path(path)
