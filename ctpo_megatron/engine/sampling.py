"""Which distribution a server is asked to draw from, in SGLang's words."""

from __future__ import annotations

from typing import Any

from ctpo_megatron.types import Truncation

# what SGLang could be told to apply by itself to requests that leave it open (--preferred-sampling-params)
NEUTRAL = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "min_new_tokens": 0}


def sampling_params(temperature: float, truncation: Truncation) -> dict[str, Any]:
    """The fields of a request that say which distribution is drawn from: all of them, so that no default of a server enters."""
    top_k = -1 if truncation.top_k is None else truncation.top_k
    return {"temperature": temperature, "top_p": truncation.top_p, "top_k": top_k, "min_p": truncation.min_p, **NEUTRAL}
