"""One turn of the model in an attempt: what is asked of the engine, and whether its answer makes a right sample."""

from __future__ import annotations

from ctpo_megatron.errors import RolloutError
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.protocols import Generator, Sampling, TokenText
from ctpo_megatron.types import Generation


async def sample_turn(
    generator: Generator, chat: TokenText, attempt: Attempt, session: int, sampling: Sampling, deadline: float | None
) -> None:
    """Add a turn of the model to `attempt`, or the rest of one that is open. Raises RolloutError."""
    stop, left = chat.stop_token_ids, sampling.max_response_tokens - attempt.response_length
    if attempt.open is None:
        attempt.open = Generation()
    generation = await generator.generate(
        attempt.tokens,
        attempt.open,
        max_new_tokens=left,
        temperature=sampling.temperature,
        truncation=sampling.truncation,
        stop_token_ids=stop,
        session=session,
        recorded=attempt.recorded if sampling.record else None,
        deadline=deadline,
    )
    check_generation(generation, left, stop)
    attempt.close_turn(generation)


def check_generation(generation: Generation, allowed: int, stop: list[int]) -> None:
    """Raise RolloutError where an answer of the engine would make a wrong sample."""
    ids, finish = generation.token_ids, generation.finish
    if not 1 <= len(ids) <= allowed:
        raise RolloutError(f"the engine answered with {len(ids)} tokens; it was asked for 1 to {allowed}")
    if finish not in ("stop", "length", "deadline"):
        raise RolloutError(f"the engine ended a generation with {finish!r}; known: stop, length, deadline")
    if finish == "length" and len(ids) < allowed:
        raise RolloutError(
            f"the engine ended a generation with 'length' after {len(ids)} of {allowed} tokens: its context or its KV cache is "
            "smaller than the run's longest sample. Lower rollout.max_response_tokens, or raise rollout.engine.max_total_tokens"
        )
    if finish == "stop" and ids[-1] not in stop:
        raise RolloutError(f"the engine ended a generation with 'stop' after token {ids[-1]}; stop tokens are {stop}")
