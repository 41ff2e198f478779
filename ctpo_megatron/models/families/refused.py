"""Known families that are not trained here, by `model_type`, each with what is missing.

Of megatron-core 0.16.1 where nothing else is named. tests/unit/models/test_refused.py looks the reasons up in the packages that
are installed, so that an entry ends when its reason does.
"""

from __future__ import annotations

_DELTA_NET = (
    "three in four of its layers are gated delta nets, which Megatron-Core computes neither over packed sequences nor under "
    "context parallelism"
)
_SPARSE = "its attention looks at tokens that an indexer picks (DSA), which Megatron-Core does not compute over packed sequences"
_SCALED_QUERIES = "its queries are scaled by their position (llama_4_scaling), which Megatron-Core does not do"
_IMAGES = "it has a vision encoder around its text model, and images are not trained on here"

REFUSED: dict[str, str] = {
    "deepseek_v32": _SPARSE,
    "gemma3": _IMAGES,
    "gemma3_text": (
        "its local and its global layers have different bases of RoPE, each layer has norms behind attention and MLP, and its "
        "embeddings are scaled; Megatron-Core's GPT model has none of these"
    ),
    "glm_moe_dsa": _SPARSE,
    "gpt_oss": (
        "its attention has sinks, and a sliding window in every other layer, which Megatron-Core computes over packed sequences "
        "with TransformerEngine only, and this package's own attention not at all; its experts have biases"
    ),
    "kimi_k2": (
        "transformers 5.19 does not know the name. Its architecture is DeepSeek-V3's: convert the weights to bfloat16, save the "
        'tokenizer as tokenizer.json (docs/models.md), and write "model_type": "deepseek_v3" into config.json'
    ),
    "kimi_k25": _IMAGES,
    "kimi_linear": "three in four of its layers are Kimi delta attention, which Megatron-Core does not have",
    "llama4": _IMAGES,
    "llama4_text": (
        "three in four of its layers look at chunks of the sequence, and the queries of the others are scaled by position; "
        "Megatron-Core does neither"
    ),
    "ministral": "sliding windows and full attention take turns in its layers, and this package's own attention has no windows",
    "ministral3": _SCALED_QUERIES,
    "mistral3": _IMAGES,
    "mistral4": _SCALED_QUERIES,
    "qwen3_5": _DELTA_NET,
    "qwen3_5_moe": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": _DELTA_NET,
}
