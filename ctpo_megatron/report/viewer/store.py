"""Where the parts of a page are: inside it while they are small, and in a directory beside it from then on.

A page that was opened from a disk may not read files, but it may add scripts: so a part beside the page is a script that calls
`ctpoPart(text)`.
"""

from __future__ import annotations

import json
from pathlib import Path

from ctpo_megatron.errors import storing

INSIDE = 3_000_000  # characters of parts that a page holds itself


class PartStore:
    """The parts of one run in one page, which are beside it in `directory` where they are more than `inside` characters."""

    def __init__(self, directory: Path, inside: int = INSIDE) -> None:
        self._directory, self._inside = directory, inside
        self._held: dict[str, str] | None = None if directory.is_dir() else {}

    @property
    def beside(self) -> bool:
        """Whether parts are files beside the page."""
        return self._held is None

    @property
    def held(self) -> dict[str, str]:
        """Returns the parts that belong into the page, by their names."""
        return self._held or {}

    def put(self, name: str, content: str) -> None:
        """Keep a part. Raises StorageError."""
        if self._held is None:
            self._write(name, content)
            return
        self._held[name] = content
        if sum(map(len, self._held.values())) > self._inside:
            held, self._held = self._held, None
            for each, text in held.items():
                self._write(each, text)

    def drop(self, name: str) -> None:
        """Let a part go. Raises StorageError."""
        with storing(self._directory):
            (self._directory / f"{name}.js").unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether a part is beside the page."""
        return (self._directory / f"{name}.js").is_file()

    def _write(self, name: str, content: str) -> None:
        with storing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            # what was cut short by an end before its time is made again: the list of what was built comes last
            (self._directory / f"{name}.js").write_text(f"ctpoPart({json.dumps(content)})\n", encoding="ascii")
