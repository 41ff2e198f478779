"""Model families, one file each, by the `model_type` of their config.json."""

from __future__ import annotations

from ctpo_megatron.models.families.deepseek import DEEPSEEK_V3
from ctpo_megatron.models.families.family import Family
from ctpo_megatron.models.families.glm import GLM4_MOE
from ctpo_megatron.models.families.glm_lite import GLM4_MOE_LITE
from ctpo_megatron.models.families.llama import LLAMA
from ctpo_megatron.models.families.mistral import MISTRAL
from ctpo_megatron.models.families.mixtral import MIXTRAL
from ctpo_megatron.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
