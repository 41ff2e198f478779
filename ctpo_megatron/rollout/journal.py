"""What attempts have said, on disk, so that no generation is paid for twice: RUN_DIR/journal.

Each record is an attempt as it was: after a tool's turn, where it was interrupted, or judged at its end; the newest one of an
attempt counts. What is noted within `GATHER_S` is encoded and written together: a record alone finds the processor's caches full
of other work, and pays the system calls of a write for itself. `find`, `sync`, `forget` and `close` have it written first, so
nobody sees a difference, and a group is on disk before anybody uses it. Which weights were published and how a step is made is
written at once, behind all that was noted before: these records are few, and what the run does next rests on them.

A process that is killed loses what it had not noted, and what it noted within the last `GATHER_S`, or since its event loop was
last free if that is longer. A host that goes down loses what was not synced, which is what came after the last whole group.

An attempt may be used again while the policy versions that sampled it are the ones that the run has, or comes to have again. That
is told by digests of the weights: where a run goes back to version v, what v sampled is good; what later versions sampled is good
if training makes the same weights once more, and is sampled anew if it does not. Which groups made a step is a record too, and is
good in the same way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from ctpo_megatron.errors import storing
from ctpo_megatron.record.deferred import Deferred
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.record.files import GrowingFile
from ctpo_megatron.record.run_events import JournalCut, JournalRead
from ctpo_megatron.record.segments import MAGIC, Place, SegmentWriter, cut, read_segment, segments
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.rollout.arrays import from_array, to_array
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.plans import Plans
from ctpo_megatron.types import AttemptId, Composition, Fate, Prompt, Trajectory

GATHER_S = 0.1  # how long what is noted may wait for more of its kind
REMEMBERED = 64  # versions of the weights that a new segment begins with; more than any staleness


@dataclass(slots=True)
class _Record:
    """One entry. `weights`: digests of the versions that sampled what it holds; alone, of those that were published.

    `composition`: how a step was made from the groups that there were, with the digest of the version that it trains.
    """

    recipe: str
    weights: dict[int, str]
    attempt: Attempt | None = None
    after: int = 0  # so many of the attempt's turns are in records before
    trajectory: Trajectory | None = None
    composition: Composition | None = None


@dataclass(slots=True)
class _Kept:
    """Where an attempt is: all records that it takes."""

    places: list[Place] = field(default_factory=list)
    turns: int = 0  # in these records
    whole: bool = False


class Journal:
    """The attempts of a run, in training and in evaluations.

    `recipe`: what sampling depends on besides weights and prompt; attempts that were made by another are not used. `recipes`: of
    evaluations on benchmarks, by what `GroupId.benchmark` says. `step`: at which the run goes on, whose weights are the first to
    be published. `storage`: what carries it over faults of the disk.
    """

    def __init__(
        self,
        directory: Path,
        recipe: str,
        *,
        recipes: Mapping[str, str] = MappingProxyType({}),
        step: int = 0,
        emit: Emit = discard,
        storage: Storage | None = None,
    ) -> None:
        self._directory, self._recipe, self._recipes, self._emit = directory, recipe, recipes, emit
        self._storage = storage or Storage()
        self._writer = SegmentWriter(directory, self._storage.write)
        self._noted: deque[Attempt | Trajectory] = deque()  # and not encoded yet
        self._writing = Deferred(self._write, GATHER_S)
        self._kept: dict[AttemptId, _Kept] = {}
        self._weights: dict[int, str] = {}
        self._plans = Plans()
        self._published = asyncio.Event()
        self._read()
        self.go_back(step)

    def go_back(self, step: int) -> None:
        """Note that the run goes on at training step `step`: later versions of the weights are to be made again.

        Raises StorageError.
        """
        self._writing.now()
        self._weights = {version: digest for version, digest in self._weights.items() if version < step}

    def published(self, version: int, digest: str) -> None:
        """Note which weights `version` is. Raises StorageError."""
        self._writing.now()
        self._weights[version] = digest
        self._plans.published(version, digest)
        self._append(_Record(self._recipe, {version: digest}))
        self._wake()

    def note(self, kept: Attempt | Trajectory) -> None:
        """Keep an attempt as it is now; a trajectory is not changed any more.

        Raises StorageError, as does whatever comes next, where what was noted before could not be written.
        """
        self._noted.append(kept if isinstance(kept, Trajectory) else kept.copy())
        self._writing.want()

    def _write(self) -> None:
        """Write what was noted. What raises an error stays, and is first the next time."""
        while self._noted:
            self._take_up(self._noted[0])
            self._noted.popleft()
        self._writer.write()

    def _take_up(self, kept: Attempt | Trajectory) -> None:
        known = self._kept.setdefault(kept.id, _Kept())
        weights = {version: self._weights[version] for version in _versions(kept) if version in self._weights}
        if isinstance(kept, Trajectory):
            known.places, known.turns = [self._add(_Record(self._recipe_of(kept.id), weights, trajectory=kept))], 0
            known.whole = True
            return
        if len(kept.turns) < known.turns:  # it began anew
            known.places, known.turns = [], 0
        experts = sum(turn.role == "assistant" for turn in kept.turns[: known.turns])
        fresh = replace(kept, turns=kept.turns[known.turns :], routed_experts=kept.routed_experts[experts:])
        known.places.append(self._add(_Record(self._recipe_of(kept.id), weights, fresh, known.turns)))
        known.turns = len(kept.turns)

    def decided(self, made: Composition) -> None:
        """Keep how a step is made (`loop.protocols.Decisions`). Raises StorageError."""
        self._writing.now()
        digest = self._weights.get(made.step, "")
        self._plans.add(made, digest, self._append(_Record(self._recipe, {made.step: digest}, composition=made)))
        self._wake()

    def planned(self, step: int) -> Composition | None:
        """Returns how `step` was made (`loop.protocols.Decisions`)."""
        return self._plans.planned(step)

    def fate(self, group: int) -> Fate | None:
        """Returns what became of a group (`loop.protocols.Decisions`)."""
        return self._plans.fate(group)

    def drop_plans(self, step: int) -> None:
        """Forget how `step` and those after it were made (`loop.protocols.Decisions`)."""
        self._plans.drop(step)
        self._wake()

    async def find(self, attempt: AttemptId, prompt: Prompt, prompt_ids: list[int]) -> Attempt | Trajectory | None:
        """Returns what is kept of an attempt (`protocols.AttemptStore.find`)."""
        self._writing.now()
        known = self._kept.get(attempt)
        if known is None:
            return None
        if self._storage.held:  # it may be among them
            await self._storage.clear()
        records = [_DECODER.decode(payload) for payload in await self._storage.patiently(partial(_payloads, known.places))]
        found = _joined(records)
        asked = found.task_ids or found.prompt_ids
        same = (records[-1].recipe, found.prompt_index, asked) == (self._recipe_of(attempt), prompt.index, prompt_ids)
        if not same or not await self._same_weights(_versions(found), records[-1].weights):
            self._kept.pop(attempt, None)  # `forget` may have come meanwhile
            return None
        return found

    def _recipe_of(self, attempt: AttemptId) -> str:
        group = attempt.group
        return self._recipe if group.evaluation is None else self._recipes.get(group.benchmark, self._recipe)

    async def _same_weights(self, versions: set[int], weights: dict[int, str]) -> bool:
        """Whether the run's `versions` are these `weights`.

        Later ones are waited for where they are to be made from the same groups again; otherwise a step could wait for a group
        that waits for the step. Whatever changes weights or plans wakes whoever waits here.
        """
        for version in sorted(versions):
            while version > max(self._weights, default=-1) and self._plans.planned(version - 1) is not None:
                await self._published.wait()
            if version not in weights or self._weights.get(version) != weights[version]:
                return False
        return True

    def _wake(self) -> None:
        published, self._published = self._published, asyncio.Event()
        published.set()

    def count(self) -> tuple[int, int]:
        """Returns how many attempts are kept whole, and how many are not; of those that are written."""
        whole = sum(kept.whole for kept in self._kept.values())
        return whole, len(self._kept) - whole

    def forget(self, group: int, step: int) -> None:
        """Drop segments in which all is older than `group`, or than the evaluation after `step`; begin a new one.

        Nothing that a checkpoint could go back to may be older. Raises StorageError.
        """
        self._writing.now()
        self._writer.end()
        self._kept = {key: kept for key, kept in self._kept.items() if not _older(key, group, step)}
        self._plans.forget(step)
        newest = dict(sorted(self._weights.items())[-REMEMBERED:])
        self._append(_Record(self._recipe, newest))
        assert self._writer.path is not None, "it was begun just now"
        self._storage.write(partial(self._drop_before, self._writer.path))

    def _drop_before(self, newest: Path) -> None:
        """Delete the segments before `newest` in which nothing is that is kept."""
        needed = {place.path for kept in self._kept.values() for place in kept.places} | self._plans.paths()
        with storing(self._directory):
            for path in segments(self._directory):
                if path not in needed and path < newest:
                    path.unlink(missing_ok=True)

    async def sync(self) -> None:
        """Bring what was noted onto the disk, beside the event loop. Raises StorageError."""
        self._writing.now()
        files = self._writer.unsynced()  # these: others may have been begun by the time at which the storage takes it
        if files:
            await self._storage.write_beside(partial(_sync, files))
            self._writer.synced(files)

    def close(self) -> None:
        """Write what was noted and close the file. Safe to call twice. Raises StorageError."""
        self._writing.now()
        self._writer.end()

    def _add(self, record: _Record) -> Place:
        return self._writer.add(_ENCODER.encode(record))

    def _append(self, record: _Record) -> Place:
        return self._writer.append(_ENCODER.encode(record))

    def _read(self) -> None:
        for path in segments(self._directory):
            end = len(MAGIC)
            for place, payload in read_segment(path):
                self._take(_DECODER.decode(payload), place)
                end = place.offset + place.size
            if lost := cut(path, end):
                self._emit(JournalCut(str(path), lost))
        if self._kept:
            self._emit(JournalRead(*self.count()))

    def _take(self, record: _Record, place: Place) -> None:
        if record.composition is not None:
            if record.recipe == self._recipe:
                self._plans.add(record.composition, record.weights.get(record.composition.step, ""), place)
            return
        kept = record.trajectory or record.attempt
        if kept is None:
            self._weights |= record.weights
            for version, digest in record.weights.items():
                self._plans.published(version, digest)
            return
        known = self._kept.setdefault(kept.id, _Kept())
        if record.after == 0:
            known.places.clear()
        known.places.append(place)
        known.turns = 0 if record.attempt is None else record.after + len(record.attempt.turns)
        known.whole = record.attempt is None


def _sync(files: list[GrowingFile]) -> None:
    for file in files:
        file.sync()


async def _payloads(places: list[Place]) -> list[bytes]:
    return [place.read() for place in places]


def _joined(records: list[_Record]) -> Attempt | Trajectory:
    """Returns what the records of one attempt say together."""
    last = records[-1]
    if last.trajectory is not None:
        return last.trajectory
    assert last.attempt is not None
    turns: list[Any] = []
    experts: list[Any] = []
    for record in records:
        assert record.attempt is not None
        turns += record.attempt.turns
        experts += record.attempt.routed_experts
    return replace(last.attempt, turns=turns, routed_experts=experts)


def _versions(kept: Attempt | Trajectory) -> set[int]:
    if isinstance(kept, Attempt):
        return kept.versions
    return {version for turn in kept.all_turns if turn.role == "assistant" for version in turn.versions}


def _older(attempt: AttemptId, group: int, step: int) -> bool:
    evaluation = attempt.group.evaluation
    return attempt.group.number < group if evaluation is None else evaluation < step


_ENCODER = msgspec.msgpack.Encoder(enc_hook=from_array)
_DECODER = msgspec.msgpack.Decoder(_Record, dec_hook=to_array)
