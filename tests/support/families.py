"""Tiny models of every family, and what transformers says about them: log-probs, gradients, and which experts it chose."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.tiny import FAMILIES, micro_batches, write_model

TEMPERATURE = 0.8
Z_LOSS = 0.01

_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,  # unlike the 24 of a key
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    # published, unknown to transformers, and SGLang asks for them
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
}
_GLM = {
    "model_type": "glm4_moe",
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "tie_word_embeddings": False,
}
_GLM_LITE = {
    **_DEEPSEEK,
    "model_type": "glm4_moe_lite",
    "q_lora_rank": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-6,  # transformers has that in the norms of the latents, whatever is said here
}
# bands, so low that all three kinds of frequency occur
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0}

MODELS: dict[str, dict[str, Any]] = {
    **{name: FAMILIES[name] for name in ("qwen2", "qwen3", "qwen3_moe", "llama")},
    "qwen3_yarn": FAMILIES["qwen3"] | {"rope_parameters": _YARN, "max_position_embeddings": 64},
    "qwen3_moe_mixed": FAMILIES["qwen3_moe"] | {"mlp_only_layers": [0], "norm_topk_prob": False},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "deepseek_v3": _DEEPSEEK
    | {"q_lora_rank": 24, "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, "max_position_embeddings": 64},
    "deepseek_v3_no_q_rank": _DEEPSEEK | {"q_lora_rank": None},
    # Kimi K2, by the name that it is trained under: no groups of experts, and bands as narrow as they can be
    "deepseek_v3_kimi": _DEEPSEEK
    | {"q_lora_rank": 24, "n_group": 1, "topk_group": 1, "max_position_embeddings": 64}
    | {"rope_parameters": _YARN | {"beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "glm4_moe_lite": _GLM_LITE,
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": None, "tie_word_embeddings": False},
    "glm4_moe": _GLM | {"use_qk_norm": True},
    "glm4_moe_no_qk_norm": _GLM | {"use_qk_norm": False},
}
# enough layers for two pipeline stages, of which each needs one with experts
DEEP: dict[str, dict[str, Any]] = {
    f"{name}_deep": MODELS[name] | {"num_hidden_layers": 4} for name in ("deepseek_v3", "glm4_moe")
}


def write_family(directory: Path, name: str) -> Path:
    """The tiny model `name` in `directory`."""
    return write_model(directory, name, options=(MODELS | DEEP)[name])


@dataclass
class Reference:
    """What transformers finds on tiny.micro_batches."""

    logp: list[np.ndarray] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)  # by names as in files, of `loss`
    expert_counts: dict[str, np.ndarray] = field(default_factory=dict)  # tokens that chose each expert, by router


def reference(path: Path, z_loss: float = 0.0) -> Reference:
    """Log-probs, the gradient of their mean over masked tokens, negated, plus the routers' z-loss, and the choice of experts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found, packs, routers = Reference(), micro_batches(), _Routers(model)
    tokens = sum(int(pack.tokens.mask.sum()) for pack in packs)
    loss = torch.zeros(())
    for pack in packs:
        pieces = []
        for start, end in zip(pack.sequences.cu_seqlens[:-1].tolist(), pack.sequences.cu_seqlens[1:].tolist(), strict=True):
            logits = model(pack.tokens.input_ids[None, start:end]).logits[0] / TEMPERATURE
            pieces.append(logits.log_softmax(-1).gather(-1, pack.tokens.labels[start:end, None]).squeeze(-1))
        logp = torch.cat(pieces)
        found.logp.append(logp.detach().numpy())
        loss = loss - logp[pack.tokens.mask].sum() / tokens + z_loss * routers.z_loss_of_pack() / len(packs)
    loss.backward()
    found.gradients, found.expert_counts = gradients_by_file_name(model), routers.counts
    return found


class _Routers:
    """Listens to the routers: logits of the pack at hand, and how often each expert has been chosen."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.logits: dict[str, list[Tensor]] = {}
        self.counts: dict[str, np.ndarray] = {}
        for name, module in model.named_modules():
            if name.endswith(".gate"):
                module.register_forward_hook(lambda _module, _in, out, name=name: self._listen(name, *out))

    def _listen(self, name: str, logits: Tensor, _gates: Tensor, chosen: Tensor) -> None:
        self.logits.setdefault(name, []).append(logits)
        count = np.bincount(chosen.flatten().numpy(), minlength=logits.shape[-1])
        self.counts[name] = self.counts.get(name, 0) + count

    def z_loss_of_pack(self) -> Tensor:
        """ST-MoE's eq. 5, summed over layers, for the logits since the last call."""
        losses = [torch.cat(parts).logsumexp(-1).square().mean() for parts in self.logits.values()]
        self.logits.clear()
        return torch.stack(losses).sum() if losses else torch.zeros(())


def gradients_by_file_name(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Gradients as transformers would write them as weights: it alone knows how it fuses experts in memory. Ends the model."""
    from safetensors.numpy import load_file

    parameters = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    assert all(parameters.values()), parameters
    for parameter in model.parameters():
        parameter.data = parameter.grad
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        named = load_file(Path(directory) / "model.safetensors")
    return {name: gradient for name, gradient in named.items() if not name.endswith("e_score_correction_bias")}
