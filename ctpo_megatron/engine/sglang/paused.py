"""Lets a paused SGLang server sleep (`--sleep-on-idle`), as one that has nothing to do does.

The scheduler of SGLang 0.5.23 polls for requests without a pause as long as generation is paused. On CPUs that takes a core from
the trainer while it publishes weights. A hook of SGLang's plugin framework adds the sleep, which ends with the next request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

TARGET = "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine"  # once in each turn of its loop


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered."""
    HookRegistry.register(TARGET, sleep, HookType.AFTER)


def sleep(_result: None, scheduler: Scheduler) -> None:
    """Sleep until a request comes, at most a second; not at all without `--sleep-on-idle`."""
    scheduler.maybe_sleep_on_idle()
