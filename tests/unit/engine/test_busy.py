"""For how long servers had something to do, against requests that are looked at every tenth of a second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.engine import busy
from ctpo_megatron.engine.busy import BusyTimes

# begin and end of requests to two servers, in tenths of a second; the step begins at 2 s and is looked at after 6 s
request = st.tuples(st.sampled_from(["inference server 0", "inference server 7"]), st.integers(0, 70), st.integers(0, 70))


@given(st.lists(request, max_size=8))
def test_shares_are_those_of_a_look_at_every_moment(requests: list[tuple[str, int, int]]) -> None:
    spans = [(name, *sorted((one, other))) for name, one, other in requests]
    times, told = BusyTimes(), dict[str, float]()
    with pytest.MonkeyPatch.context() as patch:
        for at in range(61):
            patch.setattr(busy, "_now", lambda at=at: at / 10)
            if at == 20:
                times.begin()
            for name, begin, end in spans:
                if begin == at:
                    times.asked(name)
                if end == at:
                    times.answered(name)
        told = times.metrics()
    for name in {each for each, begin, _ in spans if begin <= 60}:
        covered = sum(any(begin <= at < end for server, begin, end in spans if server == name) for at in range(20, 60))
        assert told[f"servers/busy/server_{name.rpartition(' ')[2]}"] == pytest.approx(covered / 40)


def test_nothing_is_told_before_a_step_or_of_servers_beyond_those_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "_now", lambda: 1.0)
    times = BusyTimes()
    times.asked("inference server 1")
    assert times.metrics() == {}
    times.begin()
    times.asked("inference server 64")
    monkeypatch.setattr(busy, "_now", lambda: 2.0)
    assert times.metrics() == {"servers/busy/server_1": 1.0}
