"""What a runtime has before it starts a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.cluster.runtime import Runtime
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.fleet import State
from ctpo_megatron.record.events import Event, ServerLost, ServerSuspended


@pytest.mark.parametrize(
    ("trainer", "after", "event"),
    [
        (True, State.SUSPENDED, ServerSuspended("server 0", "hangs")),
        (False, State.STARTING, ServerLost("server 0", "hangs\n(starting it again, 1 of 3)", again=True)),
    ],
)
def test_what_becomes_of_servers_is_emitted(tmp_path: Path, trainer: bool, after: State, event: Event) -> None:
    """With a trainer a failed server waits for the next publication; without one it is started again."""
    config = RunConfig.model_validate(
        {
            "name": "fleet",
            "run_dir": str(tmp_path),
            "model": {"path": str(tmp_path)},
            "data": {"train": "none.jsonl"},
            "rollout": {"engine": {"restarts": 3}},
            "cluster": {"device": "cpu"},
        }
    )
    events: list[Event] = []
    fleet = Runtime(config, tmp_path, trainer=trainer, engines=True, emit=events.append).fleet
    member = fleet.join("server 0", "http://a")
    fleet.suspend(member, "hangs")
    assert (member.state, events) == (after, [event])
