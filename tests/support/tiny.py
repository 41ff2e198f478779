"""Tiny models in Hugging Face format and packed micro-batches, the same for every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctpo_megatron.batch import MicroBatch, Sequences, TokenStreams

VOCAB = 299  # odd: padded under tensor parallelism
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        # other bands than megatron's constants, low enough that every kind of frequency occurs
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.01,
    },
}


def write_model(directory: Path, family: str, layers: int = 2, options: dict[str, Any] | None = None) -> Path:
    """A model of some layers and width 64 with random weights, float32. Returns its directory.

    `options` are what sets the family apart, where it is not one of FAMILIES.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    everything = {
        "num_hidden_layers": layers,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "initializer_range": 0.15,
        **(options or FAMILIES[family]),
    }
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**everything), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms start at 1 and biases at 0, where mistakes would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.isfinite().all(), name
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(directory)
    # model directories without a tokenizer are refused; nothing here reads one
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


def micro_batches() -> list[MicroBatch]:
    """Four packs of uneven sequences whose lengths suit context parallelism of 2; masks have holes."""
    generator = torch.Generator().manual_seed(5)
    return [_pack(lengths, generator) for lengths in ([12, 4, 28], [8, 20, 16], [40], [4, 8, 4, 12])]


def _pack(lengths: list[int], generator: torch.Generator) -> MicroBatch:
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) < 0.7
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    advantages = torch.randn(len(lengths), generator=generator).repeat_interleave(torch.tensor(lengths))
    tokens = TokenStreams(
        input_ids=torch.randint(0, VOCAB, (total,), generator=generator),
        labels=torch.randint(0, VOCAB, (total,), generator=generator),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        mask=mask,
        advantages=torch.where(mask, advantages, 0.0),
        rollout_logp=torch.where(mask, -torch.rand(total, generator=generator), 0.0),
        versions=torch.where(mask, 0, -1).to(torch.int32),
        restarts=torch.zeros(total, dtype=torch.bool),
    )
    sequences = Sequences(
        cu_seqlens=bounds,
        lengths=torch.tensor(lengths),
        groups=torch.arange(len(lengths)),
        weights=torch.ones(len(lengths), dtype=torch.float64),
        ids=torch.arange(len(lengths)),
    )
    return MicroBatch(tokens, sequences)


def transformers_logp(path: Path, temperature: float) -> tuple[list[Tensor], float, float]:
    """Log-probs of each pack by transformers, and loss and gradient norm of their masked mean negative log-likelihood."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    packs, logps = micro_batches(), []
    for pack in packs:
        pieces = []
        for start, end in zip(pack.sequences.cu_seqlens[:-1].tolist(), pack.sequences.cu_seqlens[1:].tolist(), strict=True):
            logits = model(pack.tokens.input_ids[None, start:end]).logits[0] / temperature
            pieces.append(logits.log_softmax(-1).gather(-1, pack.tokens.labels[start:end, None]).squeeze(-1))
        logps.append(torch.cat(pieces))
    tokens = sum(int(pack.tokens.mask.sum()) for pack in packs)
    loss = -sum(logp[pack.tokens.mask].sum() for logp, pack in zip(logps, packs, strict=True)) / tokens
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return [logp.detach() for logp in logps], loss.item(), norm.item()
