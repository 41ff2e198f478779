#!/bin/sh
# SGLang 0.5.23: Mixtral is served without the scaling of its rotary embedding that config.json asks for.
#
# MixtralDecoderLayer takes rope_theta alone out of config.rope_parameters (in config.json rope_scaling, with the older names), and
# MixtralAttention calls get_rope without rope_scaling, whose default is none. So a Mixtral with YaRN, linear or Llama-3 scaling is
# rotated by the frequencies without scaling, at each position and in short texts too, whereas transformers scales them. No error and
# no warning comes: the server answers, as another model than the one that was trained. rope_theta is cut to a whole number as well.
# Llama's layer passes the same dictionary on. A comparison of log-probabilities between trainer and server shows it.
#
# Here: nothing of a GPU is needed. The two files of the released package are executed, with stand-ins for all that they import, and
# the constructors of their layers run on one small configuration; get_rope, a stand-in as well, tells what it was called with.
#
# Seen (Python 3.11), for YaRN with a factor of 4 and a rope_theta of 10000.5:
#   mixtral: base 10000, rope_scaling was not passed
#   llama:   base 10000.5, rope_scaling {'rope_type': 'yarn', 'rope_theta': 10000.5, 'factor': 4.0, ...}
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" download --quiet --no-deps --dest "$work" sglang==0.5.23
"$work/venv/bin/python" -m zipfile -e "$work"/sglang-0.5.23-*.whl "$work/package"
cat > "$work/construct.py" <<'PROGRAM'
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

ROPE = {"rope_type": "yarn", "rope_theta": 10000.5, "factor": 4.0, "original_max_position_embeddings": 1024}
CONFIG = {
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,  # so that either name would be found
    "max_position_embeddings": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


class StandIns:
    """A finder of modules, the last to be asked: each module that is not there is one whose every name is a stand-in."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec:
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> MagicMock:
        return MagicMock(name=spec.name)

    def exec_module(self, module: MagicMock) -> None:
        if module.__spec__.name == "torch":
            module.nn.Module = object  # what the layers are made from has to be a class


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked_of_rope(path: Path, layer: str) -> dict:
    """Keyword arguments with which the constructor of the class `layer` in the file `path` calls get_rope."""
    module = load(path)
    module.get_rope.reset_mock()
    module.get_parallel.return_value.tp_size = 1
    module.append_stages.return_value = (None, None)
    getattr(module, layer)(SimpleNamespace(**CONFIG))
    module.get_rope.assert_called_once()
    return module.get_rope.call_args.kwargs


sys.meta_path.append(StandIns())
models = Path(sys.argv[1]) / "sglang" / "srt" / "models"
mixtral = asked_of_rope(models / "mixtral.py", "MixtralDecoderLayer")
llama = asked_of_rope(models / "llama.py", "LlamaDecoderLayer")
for name, asked in (("mixtral", mixtral), ("llama", llama)):
    scaling = asked.get("rope_scaling", "was not passed")
    print(f"{name + ':':8} base {asked['base']}, rope_scaling {scaling}")
without = "rope_scaling" not in mixtral and mixtral["base"] == int(ROPE["rope_theta"])
sys.exit(not (without and llama["rope_scaling"] == ROPE and llama["base"] == ROPE["rope_theta"]))
PROGRAM
if "$work/venv/bin/python" "$work/construct.py" "$work/package"; then
    echo "as described: the scaling does not reach Mixtral"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
