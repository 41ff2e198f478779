"""SGLang's own Qwen3 classes, unchanged."""

from __future__ import annotations

from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

EntryClass = [Qwen3ForCausalLM, Qwen3MoeForCausalLM]
