"""Pages of unit tests are made without the library of charts, a megabyte that takes two seconds to put together."""

from __future__ import annotations

import pytest

from tests.support.html_pages import leave_out_the_library


@pytest.fixture(autouse=True)
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_the_library(monkeypatch)
