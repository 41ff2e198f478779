"""What a server's answer holds besides tokens: the experts that each token went to, and the top-k tokens and the support at each
place."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.errors import EngineError
from ctpo_megatron.types import RoutingShape, Supports, TopK

Experts = NDArray[np.signedinteger]


def read_experts(meta: dict[str, Any], shape: RoutingShape, tokens: int, url: str) -> Experts | None:
    """The experts of `tokens` tokens, [tokens, expert layers, top_k]; None where the answer holds no record.

    SGLang sends base64 of int32 [tokens, layers, top_k] with a row for every layer; those without experts are left out here.
    Raises EngineError for a record of another size and for experts that the model does not have.
    """
    text = meta.get("routed_experts")
    if text is None:
        return None
    flat = np.frombuffer(base64.b64decode(text), np.int32)
    expected = (tokens, shape.num_layers, shape.top_k)
    if flat.size != tokens * shape.num_layers * shape.top_k:
        raise EngineError(
            f"{url}/generate returned {flat.size} experts; {expected[0]} tokens, {expected[1]} layers and {expected[2]} experts "
            "per token were expected. Is it a server of the model that is trained?"
        )
    experts = flat.reshape(expected)[:, list(shape.expert_layers)]
    if experts.size and not 0 <= experts.min() <= experts.max() < shape.experts:
        raise EngineError(
            f"{url}/generate returned experts from {experts.min()} to {experts.max()}; the model has 0 to {shape.experts - 1}"
        )
    return experts.astype(shape.dtype)


def forget_older(experts: Experts, labels: list[int | None], version: int) -> None:
    """Set to -1, unknown, the experts in `experts` that a token was not sampled with.

    `labels[i]` is the policy version that sampled the token after token i, None where none did. A server that goes on with
    newer weights computes all tokens before once more, and so returns the newer routing of those too.
    """
    older = [label is not None and label != version for label in labels]
    experts[np.array(older, bool)] = -1


def read_top(meta: dict[str, Any], k: int, tokens: int, url: str) -> TopK:
    """The `k` most probable tokens at each of `tokens` places. Raises EngineError where the answer has others."""
    rows = meta.get("output_top_logprobs") or []
    if len(rows) != tokens or any(len(row) != k for row in rows):
        sizes = sorted({len(row) for row in rows})
        raise EngineError(f"{url}/generate returned {len(rows)} rows of {sizes} top log-probs for {tokens} tokens; asked for {k}")
    pairs = np.array([[entry[:2] for entry in row] for row in rows], np.float64).reshape(tokens, k, 2)
    return TopK(pairs[..., 1].astype(np.int32), pairs[..., 0].astype(np.float32))


def read_supports(meta: dict[str, Any], token_ids: list[int], url: str) -> tuple[Supports, list[float]]:
    """What could have been drawn at the place of each of `token_ids`, and their log-probs in the truncated distribution.

    SGLang (0.5.23, return_sampling_mask) reports what its sampler left of the vocabulary, whichever way its backend cuts, and the
    probability of the drawn token among that. Raises EngineError where the answer has other places, or a token outside of its
    support.
    """
    rows, logp = meta.get("output_token_sampling_mask") or [], meta.get("output_token_sampling_logprobs") or []
    if not len(rows) == len(logp) == len(token_ids):
        raise EngineError(
            f"{url}/generate returned {len(rows)} supports and {len(logp)} log-probs among these for {len(token_ids)} tokens"
        )
    for token, row in zip(token_ids, rows, strict=True):
        if token not in row:
            raise EngineError(f"{url}/generate returned token {token}, which is not in the support that it reports for its place")
    ids = np.array([token for row in rows for token in row], np.int32)
    return Supports(ids, np.array([len(row) for row in rows], np.int32)), logp
