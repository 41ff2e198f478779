"""TensorBoard's event files of a run that goes on from a step: what earlier incarnations wrote beyond it is cut out of them.

TensorBoard itself does not do it. One of its loaders drops lost points tag by tag, when the tag's own next point comes; the other
drops none at the first restart that it sees. So the files are rewritten before anything is added to them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ctpo_megatron.errors import storing
from ctpo_megatron.record.hparams import TAGS

VERSION = "brain.Event:2"  # of the format that is understood here, as a file's first record names it
LAYOUT = "custom_scalars__config__"  # the tag of TensorBoard's charts
_FILES = "*tfevents*"  # what TensorBoard takes for event files
_FRAME = 16  # bytes of a record besides its content: the length (8), its checksum (4), the content's checksum (4)
_HEAD = 6  # records that open a file of `Board`: the version, twice, the first step, the charts, two of the tab HParams


@dataclass(frozen=True, slots=True)
class Cut:
    """What was cut out of the event files of a directory."""

    points: int = 0  # scalars, histograms, texts and pictures
    unreadable: int = 0  # bytes after a record that cannot be read
    kept: tuple[str, ...] = ()  # copies of files with damage in their middle, as they were
    foreign: tuple[str, ...] = ()  # files of another format, which were left as they are

    def __add__(self, other: Cut) -> Cut:
        return Cut(
            self.points + other.points,
            self.unreadable + other.unreadable,
            self.kept + other.kept,
            self.foreign + other.foreign,
        )


def cut_steps(directory: Path, first_step: int) -> Cut:
    """Remove from the event files in `directory` what belongs to `first_step` or later, and their openings, which come anew.

    These are the charts, and the settings by which runs are compared: TensorBoard would go on showing those that it read first.

    A file that holds nothing else is deleted. Each file is replaced in one step. A last record that a run was killed in the
    middle of is dropped. Where more cannot be read, the file is kept under another name besides, as TensorBoard cannot show what
    follows. Raises StorageError where the disk does not take it.
    """
    found, before = Cut(), None
    for path in sorted(directory.glob(_FILES), reverse=True):
        head = list(islice(_records(path), _HEAD))
        if not head or _parse(head[0]).file_version != VERSION:
            found += Cut(foreign=(path.name,)) if path.stat().st_size else Cut()
            continue
        # what an earlier resume has cut has no opening any more, and nothing beyond the step at which the next file begins
        done = before is not None and before <= first_step and not any(map(_opens, map(_parse, head)))
        if not done:
            with storing(path):
                found += _cut_file(path, first_step)
        before = next((event.step for event in map(_parse, head) if event.HasField("session_log")), None)
    return found


def _cut_file(path: Path, first_step: int) -> Cut:
    records = list(_records(path))
    wanted, points = [], 0
    for record in records:
        event = _parse(record)
        late = event.step >= first_step and not event.file_version
        if late or _opens(event):
            points += len(event.summary.value) if late and not _opens(event) else 0
        else:
            wanted.append(record)
    readable = sum(len(record) + _FRAME for record in records)
    unreadable = path.stat().st_size - readable
    kept: tuple[str, ...] = ()
    if unreadable and not _is_torn(path, readable, unreadable):
        copy = path.with_name(path.name.replace("tfevents", "damaged"))
        copy.unlink(missing_ok=True)
        os.link(path, copy)
        kept = (copy.name,)
    if all(_parse(record).file_version for record in wanted):
        path.unlink()
    elif len(wanted) < len(records) or unreadable:
        _replace(path, wanted)
    return Cut(points, unreadable, kept)


def _records(path: Path) -> Iterator[bytes]:
    """Yields the contents of a file's records, up to its end or to the first that cannot be read; checksums are compared."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # takes a second

    yield from RawEventFileLoader(str(path)).Load()


def _parse(record: bytes) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event.FromString(record)


def _opens(event: Any) -> bool:
    """Whether it is of what opens a file."""
    return any(value.tag == LAYOUT or value.tag.startswith(TAGS) for value in event.summary.value)


def _is_torn(path: Path, readable: int, unreadable: int) -> bool:
    """Whether what follows the first `readable` bytes is the beginning of one record, and no more."""
    if unreadable < _FRAME:
        return True
    with path.open("rb") as file:
        file.seek(readable)
        (length,) = struct.unpack("<Q", file.read(8))
    return bool(unreadable < length + _FRAME)


def _replace(path: Path, records: Sequence[bytes]) -> None:
    """Put `records` in the place of the file's, in one step."""
    from tensorboardX.record_writer import RecordWriter

    part = path.with_name(f".{path.name.replace('tfevents', 'part')}")  # TensorBoard does not take it for an event file
    writer = RecordWriter(str(part))
    for record in records:
        writer.write(record)
    writer.flush()  # to the disk
    writer.close()
    part.replace(path)
