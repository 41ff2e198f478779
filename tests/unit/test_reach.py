"""The look at listening sockets misses none, and tells what does not belong; tests/integration/test_train.py looks at runs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.support.reach import LOOPBACK, OWNERS, Listener, listeners, strangers

DOCS = Path(__file__).resolve().parents[2] / "docs"
GCS = Listener(1, "Ray's GCS", "TCP", "127.0.0.1", 1)
PLANTED = [
    (socket.AF_INET, socket.SOCK_STREAM, "0.0.0.0"),
    (socket.AF_INET6, socket.SOCK_STREAM, "::"),
    (socket.AF_INET, socket.SOCK_DGRAM, "0.0.0.0"),
    (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1"),
]


@pytest.fixture
def planted() -> Iterator[set[tuple[str, str, int]]]:
    """Sockets of this process, as (protocol, address, port)."""
    with ExitStack() as stack:
        found = set()
        for family, kind, address in PLANTED:
            sock = stack.enter_context(socket.socket(family, kind))
            sock.bind((address, 0))
            if kind == socket.SOCK_STREAM:
                sock.listen()
            found.add(("TCP" if kind == socket.SOCK_STREAM else "UDP", address, sock.getsockname()[1]))
        yield found


def test_every_socket_is_seen_and_one_that_does_not_belong_is_told(planted: set[tuple[str, str, int]]) -> None:
    found = listeners([psutil.Process()])
    assert planted <= {(each.protocol, each.address, each.port) for each in found}
    told = strangers(found)
    for protocol, address, port in planted:
        mine = [line for line in told if f"protocol='{protocol}', address='{address}', port={port})" in line]
        assert [line.partition(":")[0] for line in mine] == ([] if address in LOOPBACK else ["beyond the loopback"]) + [
            "of nobody in the table"
        ]


def test_what_the_table_has_is_no_stranger() -> None:
    assert strangers([GCS]) == []
    assert strangers([GCS, Listener(1, "Ray's GCS", "TCP", "127.0.0.1", 2)]) == ["2 of Ray's GCS (process 1)"]


def test_the_docs_have_a_row_for_every_owner() -> None:
    files = [DOCS / "operations.md", *(DOCS / "operations").glob("*.md")]
    rows = [line for file in files if file.exists() for line in file.read_text().splitlines() if line.startswith("| ")]
    for owner in OWNERS:
        assert any(row.startswith(f"| {owner.name} |") for row in rows), owner.name
