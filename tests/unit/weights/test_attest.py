"""What an engine should hold, predicted from Hugging Face tensors, and every planted fault named; no server is started."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctpo_megatron.engine.checksums import read_digests, write_digest
from ctpo_megatron.engine.digest import tensor_digest
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import ConfigError, WeightSyncError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.weights.proof.attest import Difference, attest, compare
from ctpo_megatron.weights.proof.canary import (
    Gap,
    canary_batch,
    canary_gap,
    canary_tokens,
    canary_tolerance,
    check_canary,
    join_canary,
)
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from ctpo_megatron.weights.protocol import Sent
from tests.support.often import often
from tests.support.waits import Waits

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 75,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIGMOID = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "scoring_func": "sigmoid"}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen2": {},
    "llama": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": MIXTURE | {"head_dim": 8, "num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": []},
    "glm4_moe": MIXTURE | SIGMOID | {"attention_bias": True, "topk_method": "noaux_tc", "head_dim": 8},
    "deepseek_v3": MIXTURE
    | SIGMOID
    | {"n_group": 1, "topk_group": 1}
    | {"topk_method": "noaux_tc", "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
    | {"v_head_dim": 5, "rope_interleave": True},
}


def layout_of(family: str, tp: int) -> EngineLayout:
    return EngineLayout(parse_config(COMMON | MODELS[family] | {"model_type": family}), tp)


def model(family: str, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = hf_tensors(parse_config(COMMON | MODELS[family] | {"model_type": family}))
    return {each.name: torch.randn(each.shape, generator=generator).to(torch.bfloat16) for each in tensors}


def digests(layout: EngineLayout, tensors: dict[str, Tensor]) -> list[dict[str, int]]:
    expected = ExpectedDigests(layout)
    expected.add(list(tensors.items()))
    return expected.digests()


def dense_engine(tensors: dict[str, Tensor], tp: int, rank: int) -> dict[str, Tensor]:
    """qwen3, qwen2 and llama as SGLang's layers hold them, put together by hand."""
    held: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        piece = tensor
        if any(part in name for part in ("q_proj", "gate_proj", "up_proj")):
            piece = tensor.chunk(tp)[rank]
        elif "k_proj" in name or "v_proj" in name:  # two heads; four ranks have each twice
            piece = tensor.chunk(min(tp, 2))[rank * min(tp, 2) // tp]
        elif "o_proj" in name or "down_proj" in name:
            piece = tensor.chunk(tp, 1)[rank]
        elif "embed_tokens" in name or "lm_head" in name:
            padded = torch.zeros(128, tensor.shape[1], dtype=tensor.dtype)
            padded[: len(tensor)] = tensor
            piece = padded.chunk(tp)[rank]
        fused = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name))
        held.setdefault(fused, []).append(piece)
    return {name: torch.cat(pieces) for name, pieces in held.items()}


def test_a_bucket_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, without the compiled loop: no digest of a part is copied to the host by itself."""
    layout, tensors = layout_of("qwen3", 2), model("qwen3")
    expected = digests(layout, tensors)
    monkeypatch.setattr("ctpo_megatron.engine.digest._compiled", lambda: None)
    with Waits() as waits:
        found = digests(layout, tensors)
    assert (found, waits.count) == (expected, 0)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_predicts_what_an_engine_holds(family: str, tp: int) -> None:
    layout, tensors = layout_of(family, tp), model(family)
    held = [{n: tensor_digest(t) for n, t in dense_engine(tensors, tp, rank).items()} for rank in range(tp)]
    assert compare(layout, digests(layout, tensors), held) == []


@pytest.mark.parametrize("tp", [1, 2])
def test_experts_lie_below_each_other(tp: int) -> None:
    """w13 [experts, gate and up, hidden] and w2 [experts, hidden, part of ffn]."""
    tensors, layer = model("qwen3_moe"), "model.layers.1.mlp.experts"
    found = digests(layout_of("qwen3_moe", tp), tensors)
    for rank in range(tp):
        w13 = [[tensors[f"{layer}.{e}.{x}_proj.weight"].chunk(tp)[rank] for x in ("gate", "up")] for e in range(4)]
        w2 = [tensors[f"{layer}.{e}.down_proj.weight"].chunk(tp, 1)[rank] for e in range(4)]
        assert found[rank][f"{layer}.w13_weight"] == tensor_digest(torch.stack([torch.cat(pair) for pair in w13]))
        assert found[rank][f"{layer}.w2_weight"] == tensor_digest(torch.stack(w2))


def test_latent_attention() -> None:
    """The down-projections are fused and whole; e_score_correction_bias is float32 in the engine."""
    tensors, attention = model("deepseek_v3"), "model.layers.1.self_attn"
    for rank, found in enumerate(digests(layout_of("deepseek_v3", 2), tensors)):
        down = torch.cat([tensors[f"{attention}.{x}.weight"] for x in ("q_a_proj", "kv_a_proj_with_mqa")])
        assert found[f"{attention}.fused_qkv_a_proj_with_mqa.weight"] == tensor_digest(down)
        assert found[f"{attention}.kv_b_proj.weight"] == tensor_digest(tensors[f"{attention}.kv_b_proj.weight"].chunk(2)[rank])
        bias = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert found[bias] == tensor_digest(tensors[bias].float())


@pytest.mark.parametrize("family", list(MODELS))
@given(seed=st.integers(0, 10**6), senders=st.integers(1, 4), tp=st.sampled_from([1, 2]))
@settings(max_examples=often(5), deadline=None)
def test_any_order_and_any_senders(family: str, seed: int, senders: int, tp: int) -> None:
    layout, tensors = layout_of(family, tp), model(family)
    order, shuffle = list(tensors.items()), random.Random(seed)
    shuffle.shuffle(order)
    parts = [ExpectedDigests(layout) for _ in range(senders)]
    for named in order:
        shuffle.choice(parts).add([named])
    sent = Sent(1, digests=parts[0].digests())
    for part in parts[1:]:
        sent = sent.merge(Sent(1, digests=part.digests()))
    assert compare(layout, sent.digests, digests(layout, tensors)) == []


@pytest.mark.parametrize("family", list(MODELS))
def test_one_stale_tensor_is_named(family: str) -> None:
    """Each tensor of the model in turn is old in the engine: the engine tensor that it is in is named, on its ranks, no other."""
    layout, new, old = layout_of(family, 2), model(family), model(family, seed=2)
    held, engine = digests(layout, new), ExpectedDigests(layout)
    engine.add(list(new.items()))
    for name in new:
        of_old = engine.add([(name, old[name])])[name]
        found = compare(layout, held, engine.digests())
        (tensor,) = {each.tensor for each in found}
        assert name in layout.sources(tensor)
        assert {(each.kind, each.sources) for each in found} == {("differs", tuple(layout.sources(tensor)))}
        on_ranks = [p.rank for p in layout.placements(name) if p.rows.start < p.rows.stop]
        assert [each.rank for each in found] == on_ranks
        assert engine.add([(name, old[name])])[name] == of_old  # what deltas go by
        assert engine.add([(name, new[name])])[name] != of_old
    assert engine.digests() == held


def test_planted_faults() -> None:
    layout, new, old = layout_of("qwen3_moe", 2), model("qwen3_moe"), model("qwen3_moe", seed=2)
    sent, layer = digests(layout, new), "model.layers.1"

    def differing(held: dict[str, Tensor]) -> set[str]:
        return {each.tensor for each in compare(layout, sent, digests(layout, held))}

    expert = f"{layer}.mlp.experts.3.down_proj.weight"
    assert differing(new | {expert: old[expert]}) == {f"{layer}.mlp.experts.w2_weight"}
    norms = [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
    assert differing(new | {norms[0]: new[norms[1]], norms[1]: new[norms[0]]}) == set(norms)
    swapped = [f"{layer}.mlp.experts.{e}.up_proj.weight" for e in (0, 1)]
    assert differing(new | {swapped[0]: new[swapped[1]], swapped[1]: new[swapped[0]]}) == {f"{layer}.mlp.experts.w13_weight"}
    assert differing(old) == set(layout.tensors)
    head = "lm_head.weight"
    assert differing(new | {head: old[head]}) == {head}
    # a pipeline's layers under the names that an older layout gave them
    ends = ("input_layernorm.weight", "self_attn.q_proj.weight")
    crossed = {f"model.layers.{to}.{end}": new[f"model.layers.{1 - to}.{end}"] for to in (0, 1) for end in ends}
    held_as = ("input_layernorm.weight", "self_attn.qkv_proj.weight")
    assert differing(new | crossed) == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in held_as}


def test_tied_embeddings() -> None:
    """They are one tensor of the engine; a server that has two is refused, for the second follows nothing that is sent."""
    layout, new, old, name = layout_of("qwen3", 2), model("qwen3"), model("qwen3", seed=2), "model.embed_tokens.weight"
    sent = digests(layout, new)
    assert {each.tensor for each in compare(layout, sent, digests(layout, new | {name: old[name]}))} == {name}
    twice = [rank | {"lm_head.weight": rank[name]} for rank in sent]
    assert {(each.tensor, each.kind) for each in compare(layout, sent, twice)} == {("lm_head.weight", "unknown")}


def test_missing_and_unknown_tensors() -> None:
    layout, tensors = layout_of("qwen3", 1), model("qwen3")
    sent, held = digests(layout, tensors), digests(layout, tensors)
    name = "model.norm.weight"
    del held[0][name]
    assert [(each.tensor, each.kind) for each in compare(layout, sent, held)] == [(name, "not held")]
    held[0][name] = sent[0].pop(name)
    assert [(each.tensor, each.kind) for each in compare(layout, sent, held)] == [(name, "not sent")]
    sent[0][name] = held[0][name]
    held[0]["model.layers.0.self_attn.rotary_emb.cos_sin_cache"] = 1
    assert compare(layout, sent, held) == []
    held[0]["model.layers.0.mlp.strange"] = 2
    assert compare(layout, sent, held) == [Difference(0, "model.layers.0.mlp.strange", "unknown")]
    with pytest.raises(WeightSyncError, match=r"reports 2 tensor-parallel ranks; rollout.engine.tp is 1"):
        compare(layout, sent, held * 2)


def test_messages() -> None:
    layout, new, old = layout_of("qwen3_moe", 2), model("qwen3_moe"), model("qwen3_moe", seed=2)
    sent, name = digests(layout, new), "model.layers.0.self_attn.q_proj.weight"
    stale = digests(layout, new | {name: old[name]})
    attest(layout, 7, sent, {"http://a": sent})
    with pytest.raises(WeightSyncError) as raised:
        attest(layout, 7, sent, {"http://a": sent, "http://b": stale})
    text = str(raised.value)
    assert "http://b does not hold version 7 of the weights: 1 of its tensors" in text
    assert "http://a" not in text
    assert f"model.layers.0.self_attn.qkv_proj.weight holds something else than was sent (made of {name}" in text
    with pytest.raises(WeightSyncError, match=r"no place for the tensor model.norm.wait. Did you mean 'model.norm.weight'"):
        ExpectedDigests(layout).add([("model.norm.wait", torch.ones(32))])
    with pytest.raises(WeightSyncError, match=r"model.norm.weight has the shape \[31\]; the engine expects \[32\]"):
        ExpectedDigests(layout).add([("model.norm.weight", torch.ones(31))])
    with pytest.raises(ConfigError, match=r"rollout.engine.tp = 3"):
        layout_of("qwen3", 3)
    with pytest.raises(ConfigError, match=r"a multiple of 32 \* tp = 64 .* the model has 48"):
        EngineLayout(parse_config(COMMON | MODELS["qwen3"] | {"model_type": "qwen3"}), 2, cpu=True)


def answer(*ranks: dict[str, str]) -> dict[str, Any]:
    listed = [{"checksums": sums, "parallelism_info": [{"tp_rank": rank}]} for rank, sums in enumerate(ranks)]
    return {"success": True, "message": "", "ranks": listed[::-1]}


def test_answers_of_servers() -> None:
    assert read_digests(answer({"a": write_digest(5)}, {"a": write_digest(2**64 - 1)}), "u") == [{"a": 5}, {"a": 2**64 - 1}]
    with pytest.raises(WeightSyncError, match=r"http://b reports the hash '00ff' of a, .*ctpo_digest.* install"):
        read_digests(answer({"a": "00ff"}), "http://b")
    with pytest.raises(WeightSyncError, match="gave no checksums"):
        read_digests({"success": False, "message": "no"}, "u")
    staged = answer({"a": write_digest(5)}, {"a": write_digest(6)})
    staged["ranks"][0]["parallelism_info"][0]["tp_rank"] = 0
    with pytest.raises(WeightSyncError, match="pipeline"):
        read_digests(staged, "u")


def test_canary() -> None:
    tokens = canary_tokens(75, 3)
    assert tokens == canary_tokens(75, 3)
    assert tokens != canary_tokens(75, 4)
    assert set(tokens) <= set(range(75))
    batch = canary_batch(tokens, 24)
    assert batch.positions == 72
    assert batch.tokens.labels[:63].tolist() == tokens[1:]
    assert batch.tokens.input_ids[:64].tolist() == tokens
    shards = [batch.shard(rank, 2).tokens.labels.tolist() for rank in range(2)]
    assert join_canary(shards, len(tokens)) == tokens[1:]
    assert canary_gap([-1.0, -2.0], [-1.5, -2.25]) == Gap(0.375, 0.5)
    assert canary_gap([-1.0, float("nan")], [-1.0, -1.0]) == Gap(float("inf"), float("inf"))
    check_canary("u", 1, Gap(0.1, 5.0), 0.2)
    for mean in (0.3, float("inf"), float("nan")):
        with pytest.raises(WeightSyncError, match=r"u computes other log-probs .* up to 0.4\), .*attest.canary_tolerance"):
            check_canary("u", 1, Gap(mean, 0.4), 0.2)
    with pytest.raises(WeightSyncError, match="has 2 log-probs"):
        canary_gap([1.0, 2.0], [1.0])


def test_canaries_are_made_of_the_runs_own_text() -> None:
    texts = [list(range(100, 400)), [7, 8, 9], []]
    drawn = [canary_tokens(1000, version, texts) for version in range(40)]
    assert {len(tokens) for tokens in drawn} == {64}
    assert [tokens[0] for tokens in drawn] == list(range(40)), "no two versions have a prefix in common"
    assert canary_tokens(1000, 1001, texts)[0] == 1
    follows = {(a, b) for text in texts for a, b in pairwise(text)}
    inside = [pair in follows for tokens in drawn for pair in pairwise(tokens[1:])]
    assert sum(inside) > 0.9 * len(inside), "pieces, not single tokens"
    assert len({tokens[1] for tokens in drawn}) > 10, "not always its beginning"
    assert canary_tokens(1000, 5, [[]]) == canary_tokens(1000, 5), "nothing to draw from"
    (short,) = {len(canary_tokens(1000, 5, [[3, 4]]))}
    assert short == 64


def test_a_canary_that_follows_the_servers_experts() -> None:
    experts = np.arange(64 * 3 * 2).reshape(64, 3, 2).astype(np.int16)
    replay = canary_batch(canary_tokens(75, 3), 24, experts).replay
    assert replay is not None
    assert replay.routed_experts.shape == (72, 3, 2)
    assert replay.routed_experts[:64].tolist() == experts.tolist()
    assert (replay.routed_experts[64:] == -1).all(), "padding is left to the router"
    assert canary_batch(canary_tokens(75, 3), 24).replay is None


def test_the_bound_depends_on_how_a_mixture_is_routed() -> None:
    """A healthy mixture that routes by itself differs by 0.14 to 0.37 on average (docs/gpu.md), a dense model by 0.04 at most."""
    dense = canary_tolerance("bfloat16", mixture=False, replayed=False)
    replayed = canary_tolerance("bfloat16", mixture=True, replayed=True)
    by_itself = canary_tolerance("bfloat16", mixture=True, replayed=False)
    assert 2 * 0.04 < dense <= replayed < 2 * 0.37 < by_itself
    for replay in (False, True):
        assert canary_tolerance("float32", mixture=True, replayed=replay) < 0.1 * dense
    assert canary_tolerance("float32", mixture=False, replayed=False) < 0.01 * dense
