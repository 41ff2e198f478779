"""From a run directory to an index and parts; what was built before of files that have not changed since is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ctpo_megatron.errors import storing
from ctpo_megatron.record.token_files import token_file
from ctpo_megatron.report.viewer.choice import chosen
from ctpo_megatron.report.viewer.index import index_of
from ctpo_megatron.report.viewer.parts import PART_TOKENS, PartMaker, packed_text
from ctpo_megatron.report.viewer.rows import Line, RolloutFile, read_at, rollout_files
from ctpo_megatron.report.viewer.store import PartStore
from ctpo_megatron.report.viewer.streams import streams
from ctpo_megatron.report.viewer.summaries import FileSummary, open_tokens, prompts_by_group, summarise, tokens_of
from ctpo_megatron.report.viewer.vocabulary import Vocabulary

MOST_TOKENS = 20_000_000  # whose streams a page has: 180 MB beside it
BUILT = "built.msgpack"
VERSION = 1
INDEX, PIECES = "index", "pieces"
_IDS = 1 << 20  # more than any vocabulary has

Progress = Callable[[str], None]


class BuiltFile(msgspec.Struct, gc=False):
    """What was made of a file of rows. `places`: (part, place in it) of each trajectory, (-1, -1) where no tokens are kept."""

    stamp: list[int]
    summary: FileSummary
    quota: int | None = None  # tokens that were to be kept; None: all
    parts: list[str] | None = None
    places: list[tuple[int, int]] = []


class Built(msgspec.Struct, gc=False):
    """All that was made for a page. `seen`: ids of tokens in its parts; `texts`: whether parts have decoded responses."""

    version: int = VERSION
    texts: bool = False
    seen: list[int] = []
    files: dict[str, BuiltFile] = {}


@dataclass(frozen=True, slots=True)
class Options:
    """`most_tokens`: whose streams are kept, None for all; `progress` hears what is being read."""

    most_tokens: int | None = MOST_TOKENS
    progress: Progress = lambda _what: None


def build(run_dir: Path, directory: Path, store: PartStore, vocabulary: Vocabulary | None, options: Options) -> dict[str, Any]:
    """Returns the index, after it and all parts were put into `store`. `directory`: where the list of what was built is.

    Raises StorageError.
    """
    built = _built_before(directory, texts=vocabulary is None) if store.beside else Built(texts=vocabulary is None)
    files = rollout_files(run_dir)
    _summarise(run_dir, files, built, options.progress)
    gone = set(built.files) - {file.name for file in files}
    _drop(store, [name for each in gone for name in built.files.pop(each).parts or []])
    seen = np.zeros(_IDS, np.bool_)
    seen[built.seen] = True
    for file, quota in zip(files, _quotas(files, built, options.most_tokens), strict=True):
        made = built.files[file.name]
        if not _usable(made, quota, store):
            options.progress(f"tokens of {file.path.name}")
            _drop(store, made.parts or [])
            _make_parts(run_dir, file, made, quota, store, seen, texts=built.texts)
    built.seen = np.flatnonzero(seen).tolist()
    if vocabulary is not None:
        store.put(PIECES, packed_text(msgspec.json.encode(vocabulary.table(built.seen))))
    index = index_of(run_dir, [(file, built.files[file.name]) for file in files], vocabulary)
    store.put(INDEX, packed_text(msgspec.json.encode(index)))
    if store.beside:
        with storing(directory):
            (directory / BUILT).write_bytes(msgspec.msgpack.encode(built))
    return index


def _built_before(directory: Path, *, texts: bool) -> Built:
    """Returns what an earlier call built, as far as it can be used; another release's cannot."""
    try:
        found = msgspec.msgpack.decode((directory / BUILT).read_bytes(), type=Built)
    except (OSError, msgspec.MsgspecError):
        return Built(texts=texts)
    return found if (found.version, found.texts) == (VERSION, texts) else Built(texts=texts)


def _summarise(run_dir: Path, files: Sequence[RolloutFile], built: Built, progress: Progress) -> None:
    prompts: dict[str, str] | None = None
    for file in files:
        stamp = _stamp(run_dir, file)
        before = built.files.get(file.name)
        if before is not None and before.stamp == stamp:
            continue
        progress(f"index of {file.path.name}")
        prompts = prompts_by_group(run_dir) if prompts is None else prompts
        stale = None if before is None else before.parts
        built.files[file.name] = BuiltFile(stamp, summarise(run_dir, file, prompts), parts=stale)


def _stamp(run_dir: Path, file: RolloutFile) -> list[int]:
    """Returns sizes and times of what a file's parts are made of."""
    stamp = []
    for path in (file.path, run_dir / "tokens" / token_file(file.step or 0)):
        try:
            found = path.stat()
        except OSError:
            continue
        stamp += [found.st_size, found.st_mtime_ns]
    return stamp


def _quotas(files: Sequence[RolloutFile], built: Built, most_tokens: int | None) -> list[int | None]:
    """Returns how many tokens of each file are to be kept: its share, or None for all."""
    tokens = [sum(each.tokens for each in built.files[file.name].summary.trajectories) for file in files]
    if most_tokens is None or sum(tokens) <= most_tokens:
        return [None] * len(files)
    return [most_tokens * each // sum(tokens) for each in tokens]


def _usable(made: BuiltFile, quota: int | None, store: PartStore) -> bool:
    """Whether the parts of a file are there, and hold about what they should: a run that goes on has smaller shares each time."""
    if made.parts is None or len(made.places) != len(made.summary.trajectories):
        return False
    if (quota is None) != (made.quota is None):
        return False
    now, then = quota or 0, made.quota or 0
    return now <= 2 * then and then <= 2 * now and all(map(store.has, made.parts))


def _make_parts(
    run_dir: Path, file: RolloutFile, made: BuiltFile, quota: int | None, store: PartStore, seen: Any, *, texts: bool
) -> None:
    trajectories = made.summary.trajectories
    keep = list(range(len(trajectories))) if quota is None else chosen(trajectories, quota)
    stored = None if all(each.gap is None for each in trajectories) else open_tokens(run_dir, file)
    made.quota, made.parts, made.places = quota, [], [(-1, -1)] * len(trajectories)
    maker = PartMaker(texts)
    rows = read_at(file, [Line(trajectories[place].begin, trajectories[place].size) for place in keep])
    for place, row in zip(keep, rows, strict=True):
        tokens = streams(row)
        seen[tokens.ids[tokens.ids < _IDS]] = True
        made.places[place] = len(made.parts), maker.add(row, tokens, tokens_of(stored, trajectories[place]))
        if maker.tokens >= PART_TOKENS:
            _put(file, made.parts, maker, store)
    if maker.tokens:
        _put(file, made.parts, maker, store)


def _put(file: RolloutFile, parts: list[str], maker: PartMaker, store: PartStore) -> None:
    name = f"{file.name}.{len(parts)}"
    store.put(name, maker.take())
    parts.append(name)


def _drop(store: PartStore, names: Iterable[str]) -> None:
    for name in names:
        store.drop(name)
