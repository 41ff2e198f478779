"""What a driver tells and asks a server besides generation: pausing, updates, versions, what it holds and computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ctpo_megatron.engine.fleet import Memory
from ctpo_megatron.engine.http import Requests
from ctpo_megatron.errors import EngineRefused


class ServerControl:
    """Every call is to the server at `url`, bounded by `timeout_s` where it is given; raises EngineError."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def pause(self, url: str, *, timeout_s: float | None = None) -> None:
        """Stop sampling. Generations in flight keep their tokens and lose their KV cache, so that it can be flushed; they and new
        requests wait for `resume`."""
        await self._requests.post(f"{url}/pause_generation", {"mode": "retract"}, timeout_s=timeout_s)

    async def resume(self, url: str, *, timeout_s: float | None = None) -> None:
        """Go on sampling."""
        await self._requests.post(f"{url}/continue_generation", {}, timeout_s=timeout_s)

    async def open_update(self, url: str, *, timeout_s: float | None = None) -> None:
        """Make it ready to receive weights; generation is paused. A session that a failed update left open is closed first."""
        try:
            await self._requests.post(f"{url}/begin_weight_update", {}, timeout_s=timeout_s)
        except EngineRefused:
            await self.close_update(url, timeout_s=timeout_s)
            await self._requests.post(f"{url}/begin_weight_update", {}, timeout_s=timeout_s)

    async def close_update(self, url: str, *, timeout_s: float | None = None) -> None:
        """All weights have come."""
        await self._requests.post(f"{url}/end_weight_update", {}, timeout_s=timeout_s)

    async def set_version(self, url: str, version: int, *, timeout_s: float | None = None) -> None:
        """From now on answers carry `version`, and nothing is taken from what older weights computed."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._requests.post(f"{url}/update_weight_version", body, timeout_s=timeout_s)
        await self._requests.post(f"{url}/flush_cache", {}, timeout_s=timeout_s)

    async def sleep(self, url: str, kinds: Iterable[Memory], *, timeout_s: float | None = None) -> None:
        """Give back memory that it has, while nothing is generated: pause first. On GPUs the server needs
        `--enable-memory-saver`; without it nothing is given back."""
        await self._requests.post(f"{url}/release_memory_occupation", {"tags": sorted(kinds)}, timeout_s=timeout_s)

    async def wake(self, url: str, kinds: Iterable[Memory], *, timeout_s: float | None = None) -> None:
        """Take memory again that it has given back; asked for other memory it ends. What is in it is undefined: publish."""
        await self._requests.post(f"{url}/resume_memory_occupation", {"tags": sorted(kinds)}, timeout_s=timeout_s)

    async def version(self, url: str, *, timeout_s: float | None = None) -> str:
        """The version of the weights that it reports."""
        return (await self._requests.get(f"{url}/model_info", timeout_s=timeout_s))["weight_version"]

    async def prompt_logprobs(self, url: str, token_ids: list[int], *, timeout_s: float | None = None) -> list[float]:
        """The log-probs of tokens 1, 2, ... of a prompt, each given those before it."""
        body = {
            "input_ids": token_ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._requests.post(f"{url}/generate", body, timeout_s=timeout_s)
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]

    async def checksums(self, url: str, *, timeout_s: float | None = None) -> Any:
        """The hashes of all tensors in its engine's own layout, one entry per rank; `engine.checksums` reads them."""
        return await self._requests.post(f"{url}/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
