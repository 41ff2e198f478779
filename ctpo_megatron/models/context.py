"""Whether the longest sequence of a run fits into what the model and its servers take, checked before anything is started."""

from __future__ import annotations

import re

from ctpo_megatron.config.rollout import DataConfig, EngineConfig, RolloutConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.models.shape import ModelShape

# SGLang 0.5.23 with context C takes at most C - 7 tokens of a prompt (`TpModelWorker.get_worker_info`, `validate_input_length`)
# and ends a generation at C - 2 tokens. A turn, or a generation that goes on after an update, may begin one token before its end.
RESERVED = 6
READ = 7  # tokens of its context that SGLang keeps free where it only reads a prompt
CONTEXT_FLAG, CACHE_FLAG = "--context-length", "--max-total-tokens"


def check_context(
    shape: ModelShape, data: DataConfig, rollout: RolloutConfig, *, of_response: str = "rollout.max_response_tokens"
) -> None:
    """Raise ConfigError where a prompt and its response, both at their limits, exceed a limit; the message names both sides.

    `of_response`: what the response's limit is called.
    """
    engine = rollout.engine
    longest = data.max_prompt_tokens + rollout.max_response_tokens
    asked = f"data.max_prompt_tokens + {of_response} = {data.max_prompt_tokens} + {rollout.max_response_tokens}"
    for limit, name in _limits(shape, engine):
        if longest + RESERVED > limit:
            raise ConfigError(
                f"{asked} = {longest} tokens, but {name} = {limit}, of which SGLang keeps {RESERVED} free: the longest samples "
                f"do not fit. Allowed are {max(0, limit - RESERVED)} together."
            )


def check_length(tokens: int, shape: ModelShape, place: str) -> None:
    """Raise ConfigError where a demonstration of `tokens`, found at `place`, is longer than the model's context."""
    if tokens > shape.max_positions:
        raise ConfigError(
            f"{place}: the demonstration has {tokens} tokens; allowed: {shape.context_key} = {shape.max_positions} of the "
            "model's config.json. Shorten or remove the row."
        )


def argument(engine: EngineConfig, flag: str) -> str | None:
    """What `rollout.engine.extra_args` give to `flag`, the last one as SGLang takes it; None: nothing."""
    found, words = None, engine.extra_args
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else " ".join(words[at + 1 : at + 2])
    return found


def _limits(shape: ModelShape, engine: EngineConfig) -> list[tuple[int, str]]:
    """Tokens of one sequence that the model, a server and a server's cache take, each with where that is said."""
    limits = [(shape.max_positions, f"{shape.context_key} of the model's config.json")]
    context, cache = (_number(engine, flag) for flag in (CONTEXT_FLAG, CACHE_FLAG))
    if context is not None:
        if context > shape.max_positions:
            raise ConfigError(
                f"rollout.engine.extra_args has {CONTEXT_FLAG} {context}, more than {shape.context_key} = {shape.max_positions} "
                "of the model's config.json, and the servers would not start. If the model takes longer sequences, say so there."
            )
        limits.append((context, f"{CONTEXT_FLAG} in rollout.engine.extra_args"))
    if cache is not None:
        limits.append((cache, f"{CACHE_FLAG} in rollout.engine.extra_args"))
    elif engine.max_total_tokens is not None:
        limits.append((engine.max_total_tokens, "rollout.engine.max_total_tokens"))
    return limits


def _number(engine: EngineConfig, flag: str) -> int | None:
    """What the extra arguments give to `flag`, a number as SGLang reads it: 8192, 32k, 32Ki. None: nothing that is one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KkMGT]i?)?", (argument(engine, flag) or "").strip())
    if found is None:
        return None
    number, unit = found[1], found[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    return int(float(number) * base ** (" kMGT".index(unit[0].replace("K", "k")) if unit else 0))
