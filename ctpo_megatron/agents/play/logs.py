"""What agents wrote to stderr, in RUN_DIR/logs/agents: a file for each attempt that wrote something, the newest of them."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

KEPT = 256  # files

log = logging.getLogger(__name__)


class AgentLogs:
    """The files in `directory`, which is made when the first is written. A disk at fault costs the text, never the attempt."""

    def __init__(self, directory: Path, kept: int = KEPT) -> None:
        self._directory, self._kept = directory, kept
        self._files = deque(sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime))

    def write(self, attempt: str, text: str) -> None:
        """Add `text` to the file of an attempt; nothing where it is empty. The oldest file goes where there are too many."""
        if not text:
            return
        path = self._directory / f"{attempt}.log"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(text if text.endswith("\n") else text + "\n")
            if path not in self._files:
                self._files.append(path)
            while len(self._files) > self._kept:
                self._files.popleft().unlink(missing_ok=True)
        except OSError as error:
            log.warning("what the agent of %s wrote is not kept: %s", attempt, error)
