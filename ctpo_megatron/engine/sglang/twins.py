"""Lets requests of one prompt wait for the first of them, so that the prompt is read once.

The samples of a group come together. SGLang 0.5.23 finds a prompt in its cache from the step on after the one that read it; of
requests that are read in one step each reads its own, and its policy `lpm` only puts them last in that step. A hook of SGLang's
plugin framework leaves them in the queue for that one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

TARGET = "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw"
FEWEST = 16  # tokens that are not in the cache; to read fewer again costs less than a step


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered. Does nothing where torch sees a CUDA device.

    SGLang begins the next step there before the last one's prompts are in the cache.
    """
    if torch.cuda.is_available():
        return
    HookRegistry.register(TARGET, Twins(), HookType.AROUND)


class Twins:
    """The hook, which knows who has waited: a request does so for one step at most, whatever becomes of the first one."""

    def __init__(self) -> None:
        self._waited: WeakSet[Req] = WeakSet()

    def __call__(self, choose: Callable[..., Any], scheduler: Scheduler, *args: Any, **options: Any) -> Any:
        """Returns the next batch of prompts, and what else SGLang's method does."""
        queue = scheduler.waiting_queue
        waiting = self._waiting(scheduler) if len(queue) > 1 else []
        if not waiting:
            return choose(scheduler, *args, **options)
        apart = set(waiting)
        scheduler.waiting_queue = [req for req in queue if req not in apart]
        try:
            return choose(scheduler, *args, **options)
        finally:  # what stays in the queue is in its order again, before what was put back
            known, left = set(queue), apart.union(scheduler.waiting_queue)
            back = [req for req in scheduler.waiting_queue if req not in known]
            scheduler.waiting_queue = [req for req in queue if req in left] + back

    def _waiting(self, scheduler: Scheduler) -> list[Req]:
        """Returns the requests of the queue that are to wait for one before them, and remembers them."""
        firsts: dict[tuple[Any, bytes], bool] = {}  # prompts, and whether one is worth to be waited for
        found = []
        for req in scheduler.waiting_queue:
            if req in self._waited:
                continue
            prompt = (req.extra_key, req.origin_input_ids.tobytes())
            if prompt not in firsts:
                firsts[prompt] = self._is_read(req, scheduler)
            elif firsts[prompt]:
                found.append(req)
        self._waited.update(found)
        return found

    @staticmethod
    def _is_read(req: Req, scheduler: Scheduler) -> bool:
        """Returns whether a good part of a prompt is not in the cache, and will be there after a step."""
        size = len(req.origin_input_ids)
        return size > FEWEST and size - match_kv_cache(req, scheduler.tree_cache).device_prefix_len > FEWEST
