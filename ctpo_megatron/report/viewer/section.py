"""The trajectory viewer as a section of the report's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

KEY = "trajectories"
_SCRIPTS = ("read.js", "find.js", "tokens.js", "viewer.js")


def trajectories_section(run_dirs: Sequence[Path], page: Path, options: Options | None = None) -> Section | None:
    """Returns the viewer of the runs' trajectories, for the page that will be at `page`; None where no run wrote any.

    What does not fit into the page is written to PAGE_files/trajectories beside it, where also an earlier call's work is found.
    Raises StorageError.
    """
    with_rows = [run_dir for run_dir in run_dirs if rollout_files(run_dir)]
    if not with_rows:
        return None
    keys = [KEY if len(with_rows) == 1 else f"{KEY}-{number}" for number in range(1, len(with_rows) + 1)]
    viewers = [_viewer(run_dir, page, key, options or Options()) for run_dir, key in zip(with_rows, keys, strict=True)]
    if len(viewers) > 1:
        viewers = [Markup(f"<h3>{escape(run_dir.name)}</h3>") + made for run_dir, made in zip(with_rows, viewers, strict=True)]
    return Section(KEY, "Trajectories", Markup("").join(viewers), styles=Markup(_asset("viewer.css")), scripts=_scripts())


def beside(page: Path) -> Path:
    """Returns the folder that belongs beside a page; it is there where a run has too many tokens for the page itself."""
    return page.with_name(f"{page.stem}_files")


def _viewer(run_dir: Path, page: Path, key: str, options: Options) -> Markup:
    """Returns one run's viewer. `key`: what links to its trajectories begin with (#KEY/FILE/ID)."""
    directory = beside(page) / key
    store = PartStore(directory)
    build(run_dir, directory, store, find_vocabulary(_tokenizers(run_dir)), options)
    held = "".join(f'<script type="text/plain" data-part="{escape(name)}">{text}</script>' for name, text in store.held.items())
    base = quote(f"{directory.parent.name}/{key}/") if store.beside else ""
    told = f"<noscript>This needs JavaScript.</noscript>{held}"
    return Markup(f'<div class="tv" data-key="{escape(key)}" data-base="{escape(base)}">{told}</div>')


def _scripts() -> str:
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
