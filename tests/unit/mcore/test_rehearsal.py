"""The parts of a rehearsal that need no rank: what it counts, and the micro-batches it makes."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.mcore.rehearsal.inputs import even, even_routing, faked, full_micro_batch
from ctpo_megatron.mcore.rehearsal.ledger import Ledger
from ctpo_megatron.models.config import parse_config

MIXTURE = parse_config(
    {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 99,
        "max_position_embeddings": 512,
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    }
)


def test_storages_count_while_they_live() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        ledger.label = "kept"
        kept = torch.empty(1000)
        ledger.label = "step"
        ledger.watch()
        passing = torch.empty(3000)
        view = passing[:10]  # the same storage
        del passing
        assert ledger.live == {"kept": 4000, "step": 12000}
        del view
        assert ledger.live["step"] == 0
        _later = kept.new_empty(100)
    assert ledger.peak == {"kept": 4000, "step": 12000}
    assert ledger.live == {"kept": 4000, "step": 400}


def test_what_autograd_keeps_counts_until_the_backward_pass() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        x = torch.empty(1000, requires_grad=True)
        y = x.exp().sum()
        assert ledger.live["other"] == 4000 + 4000 + 4  # exp keeps its result
        y.backward()
        del y
        assert ledger.live["other"] == 4000 + 4000  # x and its gradient


def test_peaks_before_watching_do_not_count() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        large = torch.empty(1000)
        del large
        ledger.watch()
        _small = torch.empty(10)
    assert ledger.peak.total() == 40


def test_even_counts() -> None:
    assert even(10, 4).tolist() == [2, 3, 2, 3]
    assert even(3, 8).sum() == 3
    assert even(3, 8).max() == 1


def test_routing_is_even_in_every_run_of_tokens() -> None:
    chosen = even_routing(64, MIXTURE)
    assert chosen.shape == (64, 3, 2)
    assert chosen.dtype == torch.int8
    for part in chosen.split(16):
        for layer in range(3):
            assert torch.bincount(part[:, layer].flatten().long(), minlength=8).tolist() == [4] * 8
    assert (chosen[..., 0] != chosen[..., 1]).all()


TAUGHT = {"distillation": {"teachers": [{"name": "a", "type": "copied", "path": "t"}]}}


def test_a_micro_batch_has_what_the_objective_asks_for() -> None:
    plain = full_micro_batch(32, MIXTURE, AlgorithmConfig(), replay=True)
    assert plain.positions == 32
    assert plain.replay is not None
    assert plain.tokens.top_k_ids is None
    assert plain.tokens.reference_logp is None
    assert plain.tokens.teacher_logp is None
    rich = AlgorithmConfig.model_validate({"objective": {"type": "dppo", "divergence": "topk_kl"}, "reference": {}} | TAUGHT)
    batch = full_micro_batch(32, MIXTURE, rich, replay=False)
    assert batch.replay is None
    assert batch.tokens.top_k_ids is not None
    assert batch.tokens.top_k_ids.shape == (32, rich.top_k)
    assert batch.tokens.reference_logp is not None
    assert batch.tokens.teacher_logp is not None
    assert batch.sequences.teachers is not None


def test_fakes_keep_the_borders_of_sequences() -> None:
    made: list[torch.Tensor] = []
    batch = faked(full_micro_batch(32, MIXTURE, AlgorithmConfig(), replay=True), FakeTensorMode(), made)
    assert batch.sequences.cu_seqlens.tolist() == [0, 32]
    assert isinstance(batch.tokens.input_ids, FakeTensor)
    assert isinstance(batch.replay.routed_experts, FakeTensor)
    assert all(isinstance(tensor, FakeTensor) for tensor in made)
