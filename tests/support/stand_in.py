"""transformers in bfloat16 in the place of an inference engine: other kernels, other orders of adding up, the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny import FAMILIES, write_model

Weights = Mapping[str, Tensor]  # by Hugging Face names

VOCAB = 1024
TOP_K = 2
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": VOCAB, "tie_word_embeddings": False}
EXPERTS: dict[str, int] = {"num_experts": 8, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 64}
SPREAD = 0.03  # of the weights
HEAD = 8.0  # the output layer is larger by this: a model is surer of its tokens than random weights are


def write_stand_in(directory: Path, *, mixture: bool, layers: int = 4, **other: Any) -> Path:
    """A random model whose log-probs two engines in bfloat16 disagree about as they do about large ones: docs/gpu.md.

    `other` settings of its config.json win.
    """
    family = "qwen3_moe" if mixture else "qwen3"
    options = FAMILIES[family] | SIZES | {"initializer_range": SPREAD} | (EXPERTS if mixture else {}) | other
    write_model(directory, family, layers=layers, options=options)
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= HEAD
    save_file(weights, file, metadata={"format": "pt"})
    return directory


class StandIn:
    """A model that holds whatever weights it is given, and says log-probs and experts as a server does."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self._mixture = any("experts" in name for name, _ in self._model.named_parameters())

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Hold these weights. Those of experts go into the tensors that transformers keeps all of a layer's experts in."""
        own = dict(self._model.named_parameters())
        for name, tensor in weights.items():
            if name in own:
                own[name].copy_(tensor)
                continue
            layer, _, rest = name.partition(".experts.")
            number, projection, _ = rest.split(".")
            if projection == "down_proj":
                own[f"{layer}.experts.down_proj"][int(number)].copy_(tensor)
            else:
                gate, up = own[f"{layer}.experts.gate_up_proj"][int(number)].chunk(2)
                (gate if projection == "gate_proj" else up).copy_(tensor)

    @torch.no_grad()
    def read(self, ids: list[int]) -> tuple[list[float], np.ndarray | None]:
        """Log-probs of tokens 1, 2, ... of a prompt, and the experts of its tokens, [tokens, layers, top_k]."""
        output = self._model(torch.tensor([ids]), **({"output_router_logits": True} if self._mixture else {}))
        logp = output.logits[0, :-1].float().log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
        if not self._mixture:
            return logp.tolist(), None
        return logp.tolist(), torch.stack(output.router_logits, 1).float().topk(TOP_K, -1).indices.to(torch.int8).numpy()

    @torch.no_grad()
    def write(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Texts that the model itself samples, after one random token: what it finds natural."""
        generator = torch.Generator().manual_seed(seed)
        last = torch.randint(0, VOCAB, (count, 1), generator=generator)
        tokens, past = [last], None
        for _ in range(length - 1):
            output = self._model(last, past_key_values=past, use_cache=True)
            past = output.past_key_values
            last = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            tokens.append(last)
        return torch.cat(tokens, 1).tolist()
