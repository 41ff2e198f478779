#!/bin/sh
# peft 0.21.2 with transformers 5.19.0: gate_proj, up_proj and down_proj of a mixture are other adapters than those of these names.
#
# transformers 5 keeps the experts of a layer in two tensors, gate and up of all in one of them. peft turns target_modules that were
# written for one linear layer a projection into target_parameters of these tensors, with twice the rank and twice the alpha for the
# one that holds two projections, so that the same function can be expressed. Two things come out otherwise.
#   The names now mean the routed experts alone. Shared experts and layers without experts, which still have linear layers of these
#   names, get no adapter. No message comes.
#   With use_rslora the scale is alpha over the square root of the rank. Twice the one over the root of twice the other is sqrt(2)
#   times the scale that was asked for, for gate and up, and not for down.
#
# Here: models of two layers with weights that were drawn, rank 4 and alpha 8: GLM-4.5's kind, whose first layer has no experts and
# whose second has four and a shared one, and Qwen3-MoE's with use_rslora, whose scale should be 4 everywhere.
#
# Seen (Python 3.11)
#   glm4_moe: adapters of layers 1, shared experts 0
#   qwen3_moe with use_rslora: scales 4.0 and 5.657
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.19.0 peft==0.21.2 accelerate==1.15.0
cat > "$work/adapt.py" <<'PROGRAM'
import re
import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
GLM = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}


def adapters(kind, sizes, **options):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **sizes))
    names = ["gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, **options))
    return {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}


glm = adapters("glm4_moe", GLM)
layers = sorted({int(re.search(r"layers\.(\d+)", name)[1]) for name in glm})
shared = sum("shared" in name for name in glm)
print("glm4_moe: adapters of layers", *layers, end=f", shared experts {shared}\n")
qwen = adapters("qwen3_moe", {"num_experts": 4}, use_rslora=True)
scales = sorted({round(module.scaling["default"], 3) for module in qwen.values()})
print("qwen3_moe with use_rslora: scales", " and ".join(map(str, scales)))
sys.exit((layers, shared, scales) != ([1], 0, [4.0, 5.657]))
PROGRAM
if "$work/venv/bin/python" -W ignore "$work/adapt.py"; then
    echo "as described: routed experts alone, and a scale that is sqrt(2) too large"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
