"""Model directories: what is read from them, and how a wrong one is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.errors import ModelError
from ctpo_megatron.models.config import parse_config, read_hf_config
from ctpo_megatron.models.shape import Experts, HeadAttention, Llama3Scaling, ModelShape, Rope

DENSE = {
    "model_type": "qwen3",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 301,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_model(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text("{}")
    write_safetensors(directory / "model.safetensors")
    return directory


def write_safetensors(file: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        parse_config(config)
    return str(caught.value)


def test_dense_model(tmp_path: Path) -> None:
    shape = read_hf_config(write_model(tmp_path / "m", DENSE | {"dtype": "bfloat16"}))
    assert shape == ModelShape(
        family="qwen3",
        num_layers=6,
        hidden_size=64,
        ffn_hidden_size=96,
        num_heads=8,
        attention=HeadAttention(num_kv_heads=4, head_dim=16, qk_norm=True),
        vocab_size=301,
        max_positions=128,
        rope=Rope(10000.0),
        rms_eps=1e-5,
        tie_embeddings=False,
        dtype="bfloat16",
    )
    assert shape.num_experts == 0
    assert [shape.padded_vocab_size(tp) for tp in (1, 2, 4, 7)] == [301, 302, 304, 301]


def test_families_differ_in_bias_norm_and_head_size() -> None:
    plain = {key: value for key, value in DENSE.items() if key != "head_dim"} | {"num_key_value_heads": None}
    qwen2, llama = (parse_config(plain | {"model_type": family}).attention for family in ("qwen2", "llama"))
    assert qwen2 == HeadAttention(num_kv_heads=8, head_dim=8, qkv_bias=True, qk_norm=False)
    assert llama == HeadAttention(num_kv_heads=8, head_dim=8, qkv_bias=False, qk_norm=False)
    assert parse_config(plain).attention.head_dim == 128  # qwen3's own default


def test_mixture_of_experts_in_both_versions_of_transformers() -> None:
    fifth = {key: value for key, value in MOE.items() if key != "num_experts"} | {"num_local_experts": 6}
    for config in (MOE, fifth):
        shape = parse_config(config)
        assert shape.experts == Experts(6, 2, 24, layers=(True,) * 6, normalise=True, aux_loss_coeff=0.001)
        assert shape.expert_layers == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("style", ["transformers 4", "transformers 4 with type", "transformers 5"])
def test_rope_in_both_versions_of_transformers(style: str) -> None:
    scaling = dict(LLAMA3_ROPE)
    if style == "transformers 5":
        keys = {"rope_parameters": scaling | {"rope_theta": 500000.0}}
    else:
        if style.endswith("type"):
            scaling["type"] = scaling.pop("rope_type")
        keys = {"rope_theta": 500000, "rope_scaling": scaling}
    shape = parse_config(DENSE | {"model_type": "llama"} | keys)
    assert shape.rope == Rope(500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def test_published_configs_are_read() -> None:
    """Shortened copies of what Qwen/Qwen3-30B-A3B and Qwen/Qwen2.5-7B-Instruct publish."""
    moe = parse_config(
        MOE
        | {"head_dim": 128, "hidden_size": 2048, "num_attention_heads": 32, "rope_scaling": None, "rope_theta": 1000000.0}
        | {"sliding_window": None, "use_sliding_window": False, "attention_bias": False, "torch_dtype": "bfloat16"}
    )
    assert (moe.attention.head_dim, moe.rope.theta, moe.dtype) == (128, 1000000.0, "bfloat16")
    dense = parse_config(
        {key: value for key, value in DENSE.items() if key != "head_dim"}
        | {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28}
    )
    assert dense.attention.qkv_bias


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3_mo"}, ["qwen3_mo", "qwen2, qwen3, qwen3_moe", "Did you mean 'qwen3_moe'?"]),
        ({"model_type": "mamba"}, ["'mamba' is not supported"]),
        ({"vocab_size": "301"}, ["vocab_size", "'301'", "int"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "at least 1"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", '"silu"']),
        ({"use_sliding_window": True}, ["use_sliding_window is True"]),
        ({"attention_bias": True}, ["attention_bias is True"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised (fp8)", "Convert the checkpoint to bfloat16"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, ["'longrope' is not supported", "default, llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["low_freq_factor", "missing"]),
    ],
)
def test_unsupported_dense_models(change: dict[str, Any], words: list[str]) -> None:
    message = refusal(DENSE | change)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok = 7 is more than the 6 experts"),
    ],
)
def test_unsupported_mixtures(change: dict[str, Any], word: str) -> None:
    assert word in refusal(MOE | change)


def test_missing_key_names_the_one_that_was_meant() -> None:
    config = {key: value for key, value in DENSE.items() if key != "hidden_size"} | {"hiden_size": 64}
    assert "key 'hidden_size' is missing. Did you mean 'hiden_size'?" in refusal(config)


def test_incomplete_directories(tmp_path: Path) -> None:
    def message(change: Any) -> str:
        directory = write_model(tmp_path / "m", DENSE)
        change(directory)
        with pytest.raises(ModelError) as caught:
            read_hf_config(directory)
        for file in directory.iterdir():
            file.unlink()
        return str(caught.value)

    index = json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    with pytest.raises(ModelError, match="no such model directory"):
        read_hf_config(tmp_path / "absent")
    assert "config.json: file is missing" in message(lambda d: (d / "config.json").unlink())
    assert "config.json: not valid JSON" in message(lambda d: (d / "config.json").write_text("{"))
    assert "must be a JSON object" in message(lambda d: (d / "config.json").write_text("[]"))
    assert "tokenizer files are missing" in message(lambda d: (d / "tokenizer.json").unlink())
    assert "tokenizer_config.json is missing" in message(lambda d: (d / "tokenizer_config.json").unlink())
    assert "no *.safetensors" in message(lambda d: (d / "model.safetensors").unlink())
    assert "model-00001-of-00002" in message(lambda d: (d / "model.safetensors.index.json").write_text(index))
    assert "20 bytes" in message(lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + bytes(12)))
    assert "not a safetensors file" in message(lambda d: (d / "model.safetensors").write_bytes(b"x"))

    def cut(directory: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    assert "but its header announces" in message(cut)


def test_tokenizer_bodies(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", DENSE)
    (directory / "tokenizer.json").rename(directory / "vocab.json")
    with pytest.raises(ModelError, match=r"vocab\.json with merges\.txt"):
        read_hf_config(directory)
    (directory / "merges.txt").write_text("")
    read_hf_config(directory)
