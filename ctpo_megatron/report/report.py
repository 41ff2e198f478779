"""A report of one run or several: read, looked at, and written as a page, as figures and as numbers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ctpo_megatron
from ctpo_megatron.errors import storing
from ctpo_megatron.record.files import jsonable, write_text
from ctpo_megatron.report.comparison import comparison
from ctpo_megatron.report.figures.figure import Figure
from ctpo_megatron.report.page.page import page
from ctpo_megatron.report.parts.events import events
from ctpo_megatron.report.parts.goodput import goodput
from ctpo_megatron.report.parts.health import health
from ctpo_megatron.report.parts.ledger import ledger
from ctpo_megatron.report.parts.overview import overview
from ctpo_megatron.report.parts.part import Part
from ctpo_megatron.report.parts.phases import phases
from ctpo_megatron.report.parts.proofs import proofs
from ctpo_megatron.report.parts.settings import settings
from ctpo_megatron.report.parts.training import training
from ctpo_megatron.report.reading.run import Run, read_runs
from ctpo_megatron.report.section import Section

PARTS: tuple[Callable[[Run, str], Part], ...] = (health, phases, goodput, training, ledger, events, proofs, settings)


@dataclass(frozen=True, slots=True)
class Report:
    """The parts of each run, in the order of the runs, and what compares them; `compared` is None of one run."""

    runs: tuple[Run, ...]
    parts: tuple[tuple[Part, ...], ...]
    compared: Part | None

    def figures(self) -> dict[str, Figure]:
        """Returns all figures by their key: what their places on the page and their files are called."""
        found = {} if self.compared is None else {each.id: each for each in self.compared.figures}
        for place, parts in enumerate(self.parts):
            found |= {f"{self._prefix(place)}{each.id}": each for part in parts for each in part.figures}
        return found

    def numbers(self) -> dict[str, Any]:
        """Returns all numbers of the report as JSON values; of a figure those that are drawn."""
        whole: dict[str, Any] = {"version": ctpo_megatron.__version__, "runs": []}
        for run, parts in zip(self.runs, self.parts, strict=True):
            each: dict[str, Any] = {"label": run.label, "directory": str(run.directory)}
            each |= {part.section.id.rpartition("--")[2]: dict(part.numbers) for part in parts}
            each["figures"] = {figure.id: drawn(figure) for part in parts for figure in part.figures}
            whole["runs"].append(each)
        if self.compared is not None:
            figures = {figure.id: drawn(figure) for figure in self.compared.figures}
            whole["comparison"] = {**self.compared.numbers, "figures": figures}
        plain: dict[str, Any] = jsonable(whole)
        return plain

    def html(self, viewer: Section | None = None) -> str:
        """Returns the page, with the section of the trajectory viewer behind the first screens, where there is one."""
        groups: list[tuple[str, list[Section]]] = []
        if self.compared is not None:
            groups.append(("All runs", [self.compared.section]))
        for run, parts in zip(self.runs, self.parts, strict=True):
            groups.append((run.label, [part.section for part in parts]))
        if viewer is not None:
            groups.append(("Trajectories", [viewer]))
        names = ", ".join(run.label for run in self.runs)
        made = f"made {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC by ctpo_megatron {ctpo_megatron.__version__}"
        return page(names, made, groups, {key: figure.spec() for key, figure in self.figures().items()})

    def _prefix(self, place: int) -> str:
        return prefix(place, len(self.runs))


def prefix(place: int, count: int) -> str:
    """Returns what the ids of a run's parts begin with: nothing where it is the only one."""
    return "" if count == 1 else f"run{place + 1}--"


def make_report(directories: list[Path]) -> Report:
    """Returns the report of the runs in some directories. Raises InputError where one is no run's."""
    runs = read_runs(directories)
    parts = tuple(_parts(run, prefix(place, len(runs))) for place, run in enumerate(runs))
    return Report(tuple(runs), parts, comparison(runs) if len(runs) > 1 else None)


def _parts(run: Run, begin: str) -> tuple[Part, ...]:
    parts = [make(run, begin) for make in PARTS]
    there = {part.section.id.removeprefix(begin) for part in parts} | {each.id for part in parts for each in part.figures}
    return (overview(run, begin, frozenset(there)), *parts)


def drawn(figure: Figure) -> dict[str, Any]:
    """Returns what a figure shows as JSON values."""
    spec = figure.spec()
    values = [row for data in (spec["data"], *spec.get("datasets", {}).values()) for row in _values(data)]
    return {"title": figure.title, "says": figure.says, "values": values}


def _values(data: Any) -> list[Any]:
    return data if isinstance(data, list) else data.get("values", [])


def write_page(report: Report, out: Path, viewer: Section | None = None) -> None:
    """Write the page at `out`. Raises StorageError."""
    with storing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, report.html(viewer))


def write_numbers(report: Report, path: Path) -> None:
    """Write all numbers at `path`. Raises StorageError."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report.numbers(), indent=1, allow_nan=False) + "\n")


def write_figures(figures: dict[str, Figure], directory: Path) -> list[Path]:
    """Write each figure as a PNG; returns their paths. Raises StorageError."""
    written = []
    for key, figure in figures.items():
        path = directory / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', key)}.png"
        image = figure.png()
        with storing(path):
            directory.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        written.append(path)
    return written
