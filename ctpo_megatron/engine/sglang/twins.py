"""Lets requests of one prompt wait for the first of them, so that the prompt is read once.

The samples of a group come together. SGLang 0.5.23 finds a prompt in its cache from the step on after the one that read it; of
requests that are read in one step each reads its own, and its policy `lpm` only puts them last in that step. A hook of SGLang's
plugin framework leaves them in the queue until the first has been taken out of it, which it is before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

TARGET = "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw"
FEWEST = 16  # tokens that are not in the cache; to read fewer again costs less than a step


def register() -> None:
    """Call it before `load_plugins`, which applies what is registered. Does nothing where torch sees a CUDA device."""
    if not torch.cuda.is_available():
        HookRegistry.register(TARGET, Twins(), HookType.AROUND)


class Twins:
    """The hook, which knows whose first one has been taken: they wait no more, whatever became of it."""

    def __init__(self) -> None:
        self._waited: WeakSet[Req] = WeakSet()

    def __call__(self, choose: Callable[..., Any], scheduler: Scheduler, *, running_batch: ScheduleBatch, **options: Any) -> Any:
        """Returns the next batch of prompts, and what else SGLang's method does."""
        queue = scheduler.waiting_queue
        full = running_batch.batch_is_full and not running_batch.is_empty()  # nobody is taken
        # where SGLang lets steps overlap, one begins before the last one's prompts are in the cache
        useless = full or scheduler.enable_overlap or scheduler.disable_radix_cache
        firsts = {} if useless else self._firsts(scheduler)
        if not firsts:
            return choose(scheduler, running_batch=running_batch, **options)
        scheduler.waiting_queue = [req for req in queue if req not in firsts]
        try:
            return choose(scheduler, running_batch=running_batch, **options)
        finally:  # what stays in the queue is in its order again, before what was put back
            left, known = set(scheduler.waiting_queue), set(queue)
            reading = left | {scheduler.chunked_req}  # a long prompt is read in pieces
            self._waited.update(req for req, first in firsts.items() if first not in reading)
            back = [req for req in scheduler.waiting_queue if req not in known]
            scheduler.waiting_queue = [req for req in queue if req in left or req in firsts] + back

    def _firsts(self, scheduler: Scheduler) -> dict[Req, Req]:
        """Returns the requests of the queue that are to wait, and for which one before them."""
        first: dict[Any, Req] = {}
        worth: dict[Any, bool] = {}  # to be waited for; found when there is a second request of a prompt
        found = {}
        if scheduler.chunked_req is not None:
            first[_prompt(scheduler.chunked_req)], worth[_prompt(scheduler.chunked_req)] = scheduler.chunked_req, True
        for req in scheduler.waiting_queue:
            if req in self._waited or len(req.origin_input_ids) <= FEWEST:
                continue
            prompt = _prompt(req)
            if first.setdefault(prompt, req) is req:
                continue
            if prompt not in worth:
                worth[prompt] = self._is_read(first[prompt], scheduler)
            if worth[prompt]:
                found[req] = first[prompt]
        return found

    @staticmethod
    def _is_read(req: Req, scheduler: Scheduler) -> bool:
        """Returns whether a good part of a prompt is not in the cache, and can be read from it after a step."""
        usable = req._compute_max_prefix_len(len(req.origin_input_ids))  # less where log-probs of the prompt are wanted
        return usable - match_kv_cache(req, scheduler.tree_cache).device_prefix_len > FEWEST


def _prompt(req: Req) -> tuple[Any, ...]:
    """Returns what is equal for requests that can share a prompt in the cache, and come one after the other."""
    return req.extra_key, req.cache_salt, req.lora_id, req.priority, req.origin_input_ids.tobytes()
