"""The driver's requests to a server besides generation: pausing, updates, versions, what it holds and computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.engine.answers import Experts, read_experts
from ctpo_megatron.engine.fleet import Memory
from ctpo_megatron.engine.http import Requests
from ctpo_megatron.engine.load import Load, read_load
from ctpo_megatron.errors import EngineError, EngineRefused
from ctpo_megatron.types import RoutingShape


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """What a server says about a prompt that it has read."""

    logp: list[float]  # of tokens 1, 2, ..., each given those before it
    experts: Experts | None  # that its tokens went to, [tokens, expert layers, top_k]; None where they were not asked for


class ServerControl:
    """Calls to the server at `url`, each bounded by `timeout_s` where it is given. They raise EngineError."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    async def pause(self, url: str, *, timeout_s: float | None = None) -> None:
        """Stop sampling. Generations in flight keep their tokens and lose their KV cache, so that it can be flushed; they and new
        requests wait for `resume`."""
        await self._requests.post(f"{url}/pause_generation", {"mode": "retract"}, timeout_s=timeout_s)

    async def resume(self, url: str, *, timeout_s: float | None = None) -> None:
        """Go on sampling."""
        await self._requests.post(f"{url}/continue_generation", {}, timeout_s=timeout_s)

    async def abort_all(self, url: str, *, timeout_s: float | None = None) -> None:
        """End all generations where they are: each request is answered with the tokens that it has."""
        await self._requests.post(f"{url}/abort_request", {"abort_all": True}, timeout_s=timeout_s)

    async def abort(self, url: str, rid: str, *, timeout_s: float | None = None) -> None:
        """End the generation of the request `rid` where it is. One that the server does not know is no error."""
        await self._requests.post(f"{url}/abort_request", {"rid": rid}, timeout_s=timeout_s)

    async def load(self, url: str, *, timeout_s: float | None = None) -> Load:
        """Returns how busy the server is."""
        return read_load(await self._requests.get(f"{url}/v1/loads", timeout_s=timeout_s), url)

    async def open_update(self, url: str, *, timeout_s: float | None = None) -> None:
        """Make the server ready to receive weights, while paused. A session that a failed update left open is closed first."""
        try:
            await self._requests.post(f"{url}/begin_weight_update", {}, timeout_s=timeout_s)
        except EngineRefused:
            await self.close_update(url, timeout_s=timeout_s)
            await self._requests.post(f"{url}/begin_weight_update", {}, timeout_s=timeout_s)

    async def close_update(self, url: str, *, timeout_s: float | None = None) -> None:
        """Tell the server that all weights have come."""
        await self._requests.post(f"{url}/end_weight_update", {}, timeout_s=timeout_s)

    async def set_version(self, url: str, version: int, *, timeout_s: float | None = None) -> None:
        """Let answers carry `version` from now on, and reuse nothing that older weights computed."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._requests.post(f"{url}/update_weight_version", body, timeout_s=timeout_s)
        await self._requests.post(f"{url}/flush_cache", {}, timeout_s=timeout_s)

    async def sleep(self, url: str, kinds: Iterable[Memory], *, timeout_s: float | None = None) -> None:
        """Let the server give back memory that it has. Pause first: nothing may be generated. On GPUs it needs
        `--enable-memory-saver`; without it nothing is given back."""
        await self._requests.post(f"{url}/release_memory_occupation", {"tags": sorted(kinds)}, timeout_s=timeout_s)

    async def wake(self, url: str, kinds: Iterable[Memory], *, timeout_s: float | None = None) -> None:
        """Let the server take memory again that it gave back; asked for other memory it ends. Its content is then undefined."""
        await self._requests.post(f"{url}/resume_memory_occupation", {"tags": sorted(kinds)}, timeout_s=timeout_s)

    async def version(self, url: str, *, timeout_s: float | None = None) -> str:
        """Returns the version of the weights that the server reports."""
        return (await self._requests.get(f"{url}/model_info", timeout_s=timeout_s))["weight_version"]

    async def prompt_logprobs(self, url: str, token_ids: list[int], *, timeout_s: float | None = None) -> list[float]:
        """Returns the log-probs of tokens 1, 2, ... of a prompt, each given those before it."""
        return (await self.read_prompt(url, token_ids, timeout_s=timeout_s)).logp

    async def read_prompt(
        self, url: str, token_ids: list[int], *, routing: RoutingShape | None = None, timeout_s: float | None = None
    ) -> PromptRecord:
        """What the server says about a prompt. `routing`: how the model routes, where the experts of its tokens are wanted too.

        SGLang reuses nothing of its prefix cache where log-probs are asked for from the first token on.
        """
        body: dict[str, Any] = {
            "input_ids": token_ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        if routing is not None:
            body |= {"return_routed_experts": True, "routed_experts_start_len": 0}
        meta = (await self._requests.post(f"{url}/generate", body, timeout_s=timeout_s))["meta_info"]
        experts = None if routing is None else read_experts(meta, routing, len(token_ids), url)
        if routing is not None and experts is None:
            raise EngineError(f"{url} reports no experts; was it started with --enable-return-routed-experts?")
        return PromptRecord([entry[0] for entry in meta["input_token_logprobs"][1:]], experts)

    async def checksums(self, url: str, *, timeout_s: float | None = None) -> Any:
        """Returns the hashes of all tensors in the engine's own layout, one entry per rank; `engine.checksums` reads them."""
        return await self._requests.post(f"{url}/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
