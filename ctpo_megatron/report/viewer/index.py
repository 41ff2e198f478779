"""The index as the page reads it: a column for each thing that is known of a trajectory, a row for each trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctpo_megatron.report.viewer.rows import RolloutFile
from ctpo_megatron.report.viewer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ctpo_megatron.report.viewer.build import BuiltFile

PLAIN = (
    *("id", "reward", "prompt", "sampled", "tokens", "turns", "calls", "errors", "clipped", "gap", "ratio"),
    *("oldest", "newest", "answer", "given", "excerpt"),
)
NAMED = ("status", "source")  # as places in a list of names


def index_of(run_dir: Path, files: Sequence[tuple[RolloutFile, BuiltFile]], vocabulary: Vocabulary | None) -> dict[str, Any]:
    """Returns the index as JSON values; notes are for people, and say what is missing."""
    every = [each for _, made in files for each in made.summary.trajectories]
    columns: dict[str, list[Any]] = {name: [getattr(each, name) for each in every] for name in PLAIN}
    columns["undecided"] = [int(each.undecided) for each in every]
    names: dict[str, list[str]] = {}
    for column in NAMED:
        names[column] = sorted({getattr(each, column) for each in every})
        places = {name: place for place, name in enumerate(names[column])}
        columns[column] = [places[getattr(each, column)] for each in every]
    columns["file"] = [number for number, (_, made) in enumerate(files) for _ in made.summary.trajectories]
    parts = [name for _, made in files for name in made.parts or []]
    columns["part"], columns["place"] = [], []
    before = 0
    for _, made in files:
        columns["part"] += [part if part < 0 else before + part for part, _ in made.places]
        columns["place"] += [place for _, place in made.places]
        before += len(made.parts or [])
    return {
        "run": run_dir.name,
        "files": [{"name": file.name, "kind": file.kind, "step": file.step} for file, _ in files],
        "names": names,
        "parts": parts,
        "pieces": vocabulary is not None,
        "notes": _notes([made for _, made in files], vocabulary),
        "columns": columns,
    }


def _notes(made: Sequence[BuiltFile], vocabulary: Vocabulary | None) -> list[str]:
    every = [each for file in made for each in file.summary.trajectories]
    kept = sum(part >= 0 for file in made for part, _ in file.places)
    notes = [complaint for file in made for complaint in file.summary.complaints]
    if every and all(each.gap is None for each in every):
        notes.append(
            "This run recorded nothing of training token by token (log.save_tokens), so there is no log-ratio, clip or drift."
        )
    if kept < len(every):
        notes.append(
            f"The page holds tokens of {kept:,} of {len(every):,} trajectories: of each step the worst, best, longest, "
            "most clipped, most drifted and some at random. All are in the index."
        )
    if every and vocabulary is None:
        notes.append(
            "The tokenizer of this run was not found: tokens are shown as their numbers, above them the text as recorded."
        )
    return notes
