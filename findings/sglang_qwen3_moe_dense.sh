#!/bin/sh
# SGLang 0.5.23: a Qwen3-MoE or Qwen2-MoE whose config.json has layers without experts is served with experts in these too.
#
# mlp_only_layers names layers that have one feed-forward network instead of experts, decoder_sparse_step leaves experts to every
# n-th layer; transformers 5.19.0 builds both families so. The declaration that SGLang's decoder layers are made from says "sparse"
# whatever stands there, so each layer gets experts. By its load_weights, the weights of the dense network then find no parameter of
# their name, which is a warning in the log for each, and the experts in their place keep what they were created with: the server
# answers as another model. Whoever compares what a server holds with what was trained sees it.
#
# Here: nothing of a GPU is needed. The two files of the released package are executed with stand-ins for all that they import, and
# the declarations of four layers are asked for, of which config.json gives experts to the last alone.
#
# Seen (Python 3.11), layers with experts: 0, 1, 2 and 3, of both
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" sglang==0.5.23
"$work/venv/bin/python" -m zipfile -e "$work"/sglang-0.5.23-*.whl "$work/package"
cat > "$work/ask.py" <<'PROGRAM'
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

MODEL = SimpleNamespace(num_hidden_layers=4, num_experts=8, decoder_sparse_step=2, mlp_only_layers=[1])
SEEN = {"qwen3_moe": [0, 1, 2, 3], "qwen2_moe": [0, 1, 2, 3]}


class Absent:
    """Finds what no one else has: modules all of whose names are stand-ins, but for those that classes are derived from."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return MagicMock(name=spec.name)

    def exec_module(self, module):
        if module.__spec__.name == "torch":
            module.nn.Module = object
        if module.__spec__.name == "torch.nn":
            module.Module = object


def sparse(file, layer):
    """The layers that the file's class `layer` declares to have experts."""
    names = runpy.run_path(str(file))
    kept = names[layer].stage_facts.__globals__
    kept["declare_attn"], kept["declare_ffn"] = (lambda *args, **facts: None), (lambda *args, **facts: facts)
    return [number for number in range(MODEL.num_hidden_layers) if names[layer].stage_facts(MODEL, number)[1]["sparse"]]


sys.meta_path.append(Absent())
models = Path(sys.argv[1]) / "sglang" / "srt" / "models"
found = {
    "qwen3_moe": sparse(models / "qwen3_moe.py", "Qwen3MoeDecoderLayer"),
    "qwen2_moe": sparse(models / "qwen2_moe.py", "Qwen2MoeDecoderLayer"),
}
for family, layers in found.items():
    print(f"{family}: experts in layers {layers}")
sys.exit(found != SEEN)
PROGRAM
if "$work/venv/bin/python" "$work/ask.py" "$work/package"; then
    echo "as described: mlp_only_layers and decoder_sparse_step reach neither family"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
