"""docs/tour.md names files that exist, one in each line of its lists, and fits on a screen."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOUR = ROOT / "docs" / "tour.md"
ROOMS = ("algorithms", "parallel", "rollout", "data", "mcore", "weights", "jobs", "loop", "cluster", "planning", "engine")


def files_named(text: str) -> list[str]:
    """Paths in backticks, of files of this project."""
    return re.findall(r"`((?:ctpo_megatron|tests)/[\w/]+\.py)`", text)


def test_every_file_exists() -> None:
    named = files_named(TOUR.read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_every_line_of_a_list_begins_with_a_file() -> None:
    lines = [line for line in TOUR.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    assert [line for line in lines if not re.match(r"- `(ctpo_megatron|tests)/[\w/]+\.py`: \S", line)] == []


def test_it_leads_through_the_rooms_and_fits_on_a_screen() -> None:
    text = TOUR.read_text(encoding="utf-8")
    assert [room for room in ROOMS if f"`ctpo_megatron/{room}/" not in text] == []
    assert text.count("\n") <= 45


def test_a_file_that_is_missing_is_found() -> None:
    assert files_named("- `ctpo_megatron/no/such.py`: nothing.") == ["ctpo_megatron/no/such.py"]
    assert not (ROOT / "ctpo_megatron/no/such.py").is_file()
