"""Prompts from files, and the resumable seeded order in which training sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ctpo_megatron.data.answers import answer_text
from ctpo_megatron.data.tables import check_keys, check_messages, quote, read_rows
from ctpo_megatron.errors import DataError
from ctpo_megatron.types import Prompt

COLUMNS = ("prompt", "reward_model")
ROLES = ("system", "user", "assistant")


class PromptTokenizer(Protocol):
    """Turns a conversation into the tokens that generation starts from."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of `messages`, generation prompt included."""
        ...


def read_prompts(path: str | Path, *, system_prompt: str | None = None) -> list[Prompt]:
    """All rows of a .parquet or .jsonl file with the columns `prompt` (list of {role, content}) and `reward_model`
    (struct with `ground_truth`); further columns are ignored.

    `system_prompt` is put before conversations without a system message. Raises DataError, naming the row, where one cannot
    be used: no row is ever left out.
    """
    return [_prompt(place, index, row, system_prompt) for index, (place, row) in enumerate(read_rows(path, COLUMNS))]


def check_prompt_lengths(prompts: Sequence[Prompt], tokenizer: PromptTokenizer, *, max_tokens: int, path: str | Path) -> None:
    """Raise DataError for the first prompt of `path` that is longer than `max_tokens`."""
    for prompt in prompts:
        length = len(tokenizer.prompt_ids(prompt.messages))
        if length > max_tokens:
            raise DataError(
                f"{path} row {prompt.index}: the prompt has {length} tokens; allowed: data.max_prompt_tokens = {max_tokens}. "
                "Raise that limit or remove the row."
            )


class PromptSampler:
    """An endless stream of prompts: every epoch is a permutation drawn from (seed, epoch), so a position can be resumed.

    The same seed and prompts give the same stream, however it is cut into calls of `next` and across `restore`.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("no prompts to sample from; at least one is needed")
        self._prompts = list(prompts)
        self._seed = seed
        self._fingerprint = _fingerprint(self._prompts)
        self._start_epoch(0)

    @classmethod
    def restore(cls, prompts: Sequence[Prompt], state: dict[str, Any]) -> PromptSampler:
        """The sampler that `state()` described. Raises DataError where `prompts` are not the ones it was made with."""
        sampler = cls(prompts, state["seed"])
        if state["fingerprint"] != sampler._fingerprint:
            raise DataError(
                f"the prompts changed since the state was saved: {state['count']} rows then, {len(prompts)} now, with other "
                "contents. Resume with the same file, or start a new run."
            )
        sampler._start_epoch(state["epoch"])
        sampler._position = state["position"]
        return sampler

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; epochs follow one another without a gap."""
        chosen: list[Prompt] = []
        while len(chosen) < count:
            if self._position == len(self._prompts):
                self._start_epoch(self._epoch + 1)
            chosen.append(self._prompts[self._order[self._position]])
            self._position += 1
        return chosen

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON values."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "count": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        found.update(repr((prompt.index, prompt.messages, prompt.answer)).encode())
    return found.hexdigest()


def _prompt(place: str, index: int, row: dict[str, Any], system_prompt: str | None) -> Prompt:
    messages = check_messages(place, "prompt", row["prompt"], ROLES)
    _check_extra(place, row.get("extra_info"))
    if messages[-1]["role"] != "user":
        raise DataError(f"{place}: the last message of 'prompt' has role {messages[-1]['role']!r}; it must be 'user'")
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages = ({"role": "system", "content": system_prompt}, *messages)
    return Prompt(
        index=index,
        messages=messages,
        answer=_answer(place, row["reward_model"]),
    )


def _answer(place: str, reward_model: Any) -> str:
    if not isinstance(reward_model, dict):
        raise DataError(f"{place}: 'reward_model' is {quote(reward_model)}; needed: a struct with 'ground_truth'")
    check_keys(f"{place}: reward_model", reward_model, ("ground_truth",))
    return answer_text(place, "reward_model.ground_truth", reward_model["ground_truth"])


def _check_extra(place: str, extra: Any) -> None:
    if extra is not None and not isinstance(extra, dict):
        raise DataError(f"{place}: 'extra_info' is {quote(extra)}; needed: a struct, or nothing")
