"""A model whose next token depends on the last one alone: lengths, tool calls and answers are as often as one asks for.

It is a whole model of its size, with attention and all, which add nothing, since their last matrices are zero. So it costs
what a real one costs, its trajectories are as long-tailed as real ones, and the log-prob of every token is known without it.

    any token ----> a letter                    1 - 1 / mean_turn: half of it the next of the alphabet
              +---> a program, then the end     calls / mean_turn
              +---> an answer, then the end     (1 - calls) / (2 * mean_turn)
              +---> the end                     (1 - calls) / (2 * mean_turn)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctpo_megatron.toy.model import END_OF_TURN, SPECIAL_TOKENS, make_toy_model

LETTERS = tuple(b"abcdefghijklmnopqrstuvwxyz ")
WORDS = PROGRAM, ANSWER = "\n```python\nprint(6 * 7)\n```", "\\boxed{42}"
NEVER = -30.0  # a logit; e^-30 is below what float32 adds to 1
END = 256 + SPECIAL_TOKENS.index(END_OF_TURN)
PROGRAM_ID, ANSWER_ID = _CLOSING = tuple(range(256 + len(SPECIAL_TOKENS) - len(WORDS), 256 + len(SPECIAL_TOKENS)))


@dataclass(frozen=True, slots=True)
class Chain:
    """What follows what. `mean_turn`: letters of a turn, by a geometric distribution; `calls`: share of turns that end with a
    program; of the others half have an answer, which is always the same."""

    mean_turn: float
    calls: float = 0.0

    def after(self, token: int) -> dict[int, float]:
        """Returns the probabilities of the tokens that may follow `token`; all others have next to none.

        After a letter the next one of the alphabet has half of what letters have, so one too many, or too few, shows.
        """
        if token in _CLOSING:
            return {END: 1.0}
        end = 1 / self.mean_turn
        ends = {PROGRAM_ID: self.calls * end, ANSWER_ID: (1 - self.calls) * end / 2, END: (1 - self.calls) * end / 2}
        likely = 0.5 if token in LETTERS else 0.0
        letters = dict.fromkeys(LETTERS, (1 - end) * (1 - likely) / len(LETTERS))
        if likely:
            letters[LETTERS[(LETTERS.index(token) + 1) % len(LETTERS)]] += (1 - end) * likely
        return {each: share for each, share in (letters | ends).items() if share > 0}

    def logp(self, last: int, token_ids: list[int]) -> list[float]:
        """Returns the log-prob of each of `token_ids`, which follow the token `last`, at temperature 1."""
        found = []
        for token in token_ids:
            share = self.after(last).get(token, 0.0)
            found.append(math.log(share) if share else NEVER)
            last = token
        return found


def make_chain_model(directory: str | Path, chain: Chain, *, seed: int = 1, **sizes: Any) -> Path:
    """Write a model that is `chain`, in Hugging Face format, and return its directory; `sizes` are those of `make_toy_model`."""
    import torch
    from safetensors.torch import load_file, save_file

    target = make_toy_model(directory, seed=seed, words=WORDS, **sizes)
    file = target / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    # a token is of one of these kinds, each a direction of its own, which the last norm leaves as it is
    kinds = [_CLOSING, *((letter,) for letter in LETTERS)]
    kinds.append(tuple(set(range(len(embedding))) - {token for kind in kinds for token in kind}))
    size = math.sqrt(embedding.shape[1])
    embedding.zero_()
    head.zero_()
    for place, kind in enumerate(kinds):
        embedding[list(kind), place] = size
        logits = torch.full((len(head),), NEVER)
        for following, share in chain.after(kind[0]).items():
            logits[following] = math.log(share)
        head[:, place] = logits / size
    save_file(tensors, file, metadata={"format": "pt"})
    return target
