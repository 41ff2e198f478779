"""What a judge has said, on disk: equal requests are paid for once, and a run that goes on knows what it has spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from ctpo_megatron.errors import ConfigError, storing
from ctpo_megatron.record.files import GrowingFile, Through, at_once, drop_half_line


class Reply(msgspec.Struct, frozen=True):
    """What a request came to. `key`: of the request; None: it failed. `tokens`: of prompt and reply, as the server counts."""

    key: str | None
    said: str = ""
    tokens: int = 0
    cut: bool = False  # whether its own limit of tokens ended it


@dataclass(slots=True)
class Spent:
    """What was asked for so far."""

    calls: int = 0
    tokens: int = 0


class Replies:
    """The file at `path`, a line of JSON for each request, and what it holds. Raises ConfigError where it is another file."""

    def __init__(self, path: Path, through: Through = at_once) -> None:
        self.spent = Spent()
        self._known: dict[str, Reply] = {}
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_half_line(path)
            lines = path.read_bytes().splitlines() if path.exists() else []
        decoder = msgspec.json.Decoder(Reply)
        for number, line in enumerate(lines, 1):
            try:
                self._take(decoder.decode(line))
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{path}, line {number}: no reply of a judge ({error}); give rollout.reward.replies another file"
                ) from error
            self.spent.calls += 1
        self._file = GrowingFile(path, through)

    def find(self, key: str) -> Reply | None:
        """Returns what the judge said to a request, None where it has said nothing yet."""
        return self._known.get(key)

    def begin(self) -> None:
        """Count a request that is sent now."""
        self.spent.calls += 1

    def add(self, reply: Reply) -> None:
        """Keep what a request came to. Raises StorageError."""
        self._take(reply)
        self._file.append(msgspec.json.encode(reply) + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _take(self, reply: Reply) -> None:
        self.spent.tokens += reply.tokens
        if reply.key is not None:
            self._known[reply.key] = reply
