"""Files of a run as JSON and YAML values, whatever state they are in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml


class Complaints(list[str]):
    """What of a run is missing or damaged, one sentence each."""

    def missing(self, path: Path, what: str) -> None:
        """Note that a file is not there, and what the report lacks without it."""
        self.append(f"{path.name} is not there: {what}")


def objects(path: Path, complaints: Complaints, what: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file with one on each line; nothing where there is no file.

    A last line without its end is still being written, or was when the run was killed, and is left out. Other lines that hold no
    object are left out with a complaint. `what`: what a report lacks without the file.
    """
    damaged = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    value = msgspec.json.decode(line)
                except msgspec.DecodeError:
                    value = None
                if isinstance(value, dict):
                    yield value
                else:
                    damaged += 1
    except FileNotFoundError:
        complaints.missing(path, what)
    except OSError as error:
        complaints.append(f"{path.name} cannot be read, {error.strerror}: {what}")
    if damaged:
        complaints.append(f"{path.name}: {damaged:,} lines hold no JSON object and were left out")


def mapping(path: Path, complaints: Complaints, what: str) -> dict[str, Any]:
    """Returns a file of JSON or, by its name, YAML that holds one mapping; an empty one, with a complaint, where it does not."""
    try:
        content = path.read_bytes()
        value = yaml.safe_load(content) if path.suffix == ".yaml" else msgspec.json.decode(content)
    except FileNotFoundError:
        complaints.missing(path, what)
        return {}
    except OSError as error:
        complaints.append(f"{path.name} cannot be read, {error.strerror}: {what}")
        return {}
    except (yaml.YAMLError, msgspec.DecodeError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        complaints.append(f"{path.name} is damaged: {what}")
        return {}
    return value


def number(value: Any) -> float | None:
    """Returns a number as it stands in a file, NaN and infinities by their names too; None for what is none."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
