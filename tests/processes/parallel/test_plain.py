"""Collectives of plain data between two gloo ranks: this process and a new one that takes part in whatever it is told."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import ctpo_megatron
from ctpo_megatron.mcore.checkpoint.rank_report import RankReport
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.models.owners import Holding
from ctpo_megatron.parallel import plain
from ctpo_megatron.parallel.plain import all_gather_plain, broadcast_plain, gather_plain

BOUND = timedelta(seconds=60)
UNPICKLING = re.compile(r"[. ](all_gather_object|gather_object|(broadcast|scatter|send|recv)_object_list)(\(|$)", re.MULTILINE)
HOLDING = Holding(RankCoords(dp_rank=1, expert_layers=(1, 2)), (0, 1), first=True, last=False)
REPORT = RankReport({"a.distcp": {"size": 3, "digest": "ff"}}, {"a.distcp": [["weight", [0, 2], [4], "float32", "ff", 0, 3]]})

leaves = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=30) | st.binary(max_size=30)
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4))

Collective = Callable[..., Any]


class Pair:
    """This process is rank 0. Rank 1 is no fork of it, which would have what other tests have locked, and not their threads."""

    def __init__(self, meeting: Path) -> None:
        self._end, theirs = mp.Pipe()
        self.child = mp.get_context("spawn").Process(target=_take_part, args=(theirs, meeting), daemon=True)
        self.child.start()
        _join(meeting, 0)

    def run(self, collective: Collective, mine: Any, theirs: Any) -> tuple[Any, Any]:
        """What the collective gives on both ranks: its result, or the text of its ValueError."""
        self._end.send((collective, theirs))
        own = _outcome(collective, mine)
        assert self._end.poll(BOUND.total_seconds())
        return own, self._end.recv()

    def close(self) -> None:
        self._end.send(None)
        dist.destroy_process_group()
        self.child.join(BOUND.total_seconds())
        assert self.child.exitcode == 0


def _join(meeting: Path, rank: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(meeting), 2), rank=rank, world_size=2, timeout=BOUND)


def _take_part(commands: Connection, meeting: Path) -> None:
    _join(meeting, 1)
    while (command := commands.recv()) is not None:
        commands.send(_outcome(*command))


def _outcome(collective: Collective, mine: Any) -> Any:
    try:
        return collective(mine)
    except ValueError as error:
        return f"refused: {error}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "store")
    yield pair
    pair.close()


def same(found: Any, expected: Any) -> bool:
    """Equal to the bit and in their types: NaN is NaN, 1 is not 1.0 and not True."""
    return repr(found) == repr(expected)


@settings(max_examples=25, deadline=None)
@given(mine=values, theirs=values)
def test_what_ranks_bring_arrives_as_it_was(pair: Pair, mine: Any, theirs: Any) -> None:
    assert same(pair.run(partial(all_gather_plain, kind=Any), mine, theirs), ([mine, theirs],) * 2)
    assert same(pair.run(partial(gather_plain, kind=Any), mine, theirs), ([mine, theirs], []))
    assert same(pair.run(partial(broadcast_plain, kind=Any), mine, theirs), (mine, mine))
    assert same(pair.run(partial(broadcast_plain, kind=Any, source=1), mine, theirs), (theirs, theirs))


@pytest.mark.parametrize(
    ("kind", "mine", "theirs"),
    [
        (Holding, HOLDING, Holding(RankCoords(), (), first=False, last=True)),
        (tuple[RankReport | None, str | None], (REPORT, None), (None, "the disk is full")),
        (tuple[int, int], (2**40, 0), (1, 2)),
        (str | None, None, "complaint ü"),
    ],
)
def test_what_the_package_sends_comes_back_in_its_types(pair: Pair, kind: Any, mine: Any, theirs: Any) -> None:
    assert pair.run(partial(all_gather_plain, kind=kind), mine, theirs) == ([mine, theirs],) * 2


def test_another_type_than_expected_is_refused_on_every_rank(pair: Pair) -> None:
    said = "refused: rank 1 sent what cannot be read: Expected `int`, got `str`"
    assert pair.run(partial(all_gather_plain, kind=int), 1, "1") == (said, said)


def test_a_pickle_is_refused_and_not_run(pair: Pair, tmp_path: Path) -> None:
    trace = tmp_path / "was here"
    for collective in (all_gather_plain, gather_plain, partial(broadcast_plain, source=1)):
        mine, _ = pair.run(partial(_sending_pickles, collective), None, str(trace))
        assert mine.startswith("refused: rank 1 sent what cannot be read")
    assert not trace.exists()
    pickle.loads(pickle.dumps(_Evil(str(trace))))
    assert trace.exists(), "whoever unpickles it runs it"


class _Evil:
    """Its pickle makes a directory where it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def _sending_pickles(collective: Collective, path: str | None) -> Any:
    """The collective by a rank that sends a pickle, which would make a directory at `path`, unless that is None."""
    codec = plain.msgspec.msgpack
    encode = codec.encode
    codec.encode = encode if path is None else lambda _: pickle.dumps(_Evil(path))
    try:
        return collective(path, Any)
    finally:
        codec.encode = encode


def test_nothing_of_the_package_unpickles_what_ranks_send() -> None:
    root = Path(ctpo_megatron.__file__).parent
    assert [str(path.relative_to(root)) for path in root.rglob("*.py") if UNPICKLING.search(path.read_text())] == []
    assert UNPICKLING.search("dist.all_gather_object(everyone, mine)")
