"""Which tensors servers keep in fp8, where their scales lie in an engine, and which models and servers are refused."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ctpo_megatron.engine.fp8 import matrix_of, quantised_matrix
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.mcore.hf.buffers import BucketMemory
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.models.quantised import is_quantised, served_tensors
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.weights.proof.expected import ExpectedDigests
from ctpo_megatron.weights.quantised import Quantiser
from ctpo_megatron.weights.transports.flat import _as_it_lies
from tests.support.families import MODELS

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 128, "vocab_size": 299, "max_position_embeddings": 128, "hidden_act": "silu", "model_type": "qwen3_moe"}
SIZES |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 256, "mlp_only_layers": [0]}


LATENT = MODELS["deepseek_v3"] | {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
LATENT |= {"vocab_size": 299, "hidden_act": "silu"}


def shape(**other: Any) -> ModelShape:
    return parse_config(SIZES | other)


def test_what_is_quantised() -> None:
    """Matrices of layers but for routers; of every family the names say the same."""
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    mlp = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {each.name for each in hf_tensors(shape()) if is_quantised(each)} == {
        *(f"model.layers.{layer}.{name}" for layer in (0, 1) for name in attention),
        *(f"model.layers.0.mlp.{name}" for name in mlp),
        *(f"model.layers.1.mlp.experts.{expert}.{name}" for expert in (0, 1) for name in mlp),
    }


def weights_of(shape: ModelShape) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(each.name, torch.randn(each.shape, generator=generator).bfloat16()) for each in hf_tensors(shape)]


def test_buckets_are_let_go() -> None:
    """A stream keeps none that it has given out, nor its source: their memory is used again. Empty ones stay."""
    model = shape()
    quantiser, weights = Quantiser(model, memory := BucketMemory(torch.device("cpu"))), weights_of(model)[:9]
    given = list[weakref.ref[torch.Tensor]]()

    def buckets() -> Iterator[list[tuple[str, torch.Tensor]]]:
        for name, tensor in weights:
            assert all(each() is None for each in given)
            copied = tensor.clone()
            given.append(weakref.ref(copied))
            yield [(name, copied)]
            del copied
            yield []

    sizes = []
    for bucket in quantiser.stream(buckets()):
        sizes.append(sum(tensor.nbytes for _, tensor in bucket))
        del bucket
    assert (len(sizes), sizes.count(0)) == (18, 9)
    assert memory.nbytes == max(sizes), "one buffer, as nobody holds two"


@pytest.mark.parametrize("tp", [1, 2])
def test_the_engine_is_put_together(tp: int) -> None:
    """Tensors of an engine, made of what is sent by `placements` alone, stand for the same numbers as those of the trainer."""
    model = shape()
    layout, plain = EngineLayout(model, tp, quantised=True), EngineLayout(model, tp)
    sent = Quantiser(model, BucketMemory(torch.device("cpu"))).bucket(weights_of(model))
    assert [name for name, _ in sorted(sent)] == sorted(each.name for each in served_tensors(hf_tensors(model)))
    assert _as_it_lies(sent, torch.device("cpu")) is not None, "it is sent without a copy"
    engine = assembled(layout, sent, tp)
    stood_for = {name: matrix_of(*quantised_matrix(tensor)) if f"{name}_scale_inv" in layout.names else tensor.float()
                 for name, tensor in weights_of(model)}  # fmt: skip
    expected = assembled(plain, list(stood_for.items()), tp)
    for rank in range(tp):
        for name, tensor in expected[rank].items():
            held, scales = engine[rank][name], engine[rank].get(f"{name}_scale_inv")
            assert torch.equal(held.float() if scales is None else matrix_of(held, scales), tensor), (rank, name)
    assert layout.tensors == {*plain.tensors, *(f"{name}_scale_inv" for name in plain.tensors if any(
        part in name for part in ("_proj.weight", "experts.w")))}  # fmt: skip


def assembled(layout: EngineLayout, sent: list[tuple[str, torch.Tensor]], tp: int) -> list[dict[str, torch.Tensor]]:
    parts: list[dict[str, list[tuple[int, int, torch.Tensor]]]] = [{} for _ in range(tp)]
    for name, tensor in sent:
        for place in layout.placements(name):
            part = torch.atleast_2d(tensor)[place.rows, place.columns]
            parts[place.rank].setdefault(place.tensor, []).append((place.row, place.column, part))
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(tp)]
    for rank, tensors in enumerate(parts):
        for name, pieces in tensors.items():
            high = max(row + part.shape[0] for row, _, part in pieces)
            wide = max(column + part.shape[1] for _, column, part in pieces)
            whole = torch.full((high, wide), -1, dtype=torch.float32).to(pieces[0][2].dtype)
            for row, column, part in pieces:
                whole[row : row + part.shape[0], column : column + part.shape[1]] = part
            found[rank][name] = whole
    return found


def test_digests_know_bytes_and_scales() -> None:
    """A number that fp8 rounds away changes no digest; one that it does not changes that of its tensor, or of its scales too."""
    model, name = shape(), "model.layers.0.self_attn.o_proj.weight"
    quantiser, layout = Quantiser(model, BucketMemory(torch.device("cpu"))), EngineLayout(model, 1, quantised=True)
    weights = dict(weights_of(model))

    def changed(factor: float, at: int) -> set[str]:
        found = []
        for times in (1.0, factor):
            tensor = weights[name].clone()
            tensor.view(-1)[at] *= times
            expected = ExpectedDigests(layout)
            expected.add(quantiser.bucket([(name, tensor)]))
            found += expected.digests()
        return {each for each in found[0] if found[0][each] != found[1][each]}

    block = weights[name][:128, :128].float().abs()
    large, small = int(block.argmax() // 128 * 256 + block.argmax() % 128) * 2, 300
    assert weights[name].shape == (256, 512)
    large = int(block.argmax()) // 128 * 512 + int(block.argmax()) % 128
    assert changed(1 + 2**-7, small) == set()
    assert changed(2.0, small) == {name}
    assert changed(2.0, large) == {name, f"{name}_scale_inv"}


@pytest.mark.parametrize(
    ("model", "tp", "message"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
            1,
            r"k_proj.weight \[64, 256\] is \[64, 256\] on each",
        ),
        (
            {"intermediate_size": 384},
            2,
            r"layers.0.mlp.gate_proj.weight \[384, 256\] is \[192, 256\] on each of rollout.engine.tp=2",
        ),
        ({"moe_intermediate_size": 320}, 1, r"experts.0.gate_proj.weight \[320, 256\]"),
        ({"hidden_size": 320}, 1, r"q_proj.weight \[512, 320\]"),
    ],
)
def test_parts_of_blocks_are_refused(model: dict[str, Any], tp: int, message: str) -> None:
    EngineLayout(shape(**model), tp)
    with pytest.raises(ConfigError, match=message):
        EngineLayout(shape(**model), tp, quantised=True)


def test_latent_attention_is_refused() -> None:
    model = parse_config(LATENT)
    with pytest.raises(ConfigError, match="deepseek_v3 has latent attention"):
        EngineLayout(model, 1, quantised=True)
