#!/bin/sh
# transformers 5.19.0: beside a config.json of model_type qwen2, AutoTokenizer takes Qwen2Tokenizer, whatever class is named.
#
# The directory holds a tokenizer of its own (tokenizer.json: bytes, no normalizer, no splitting), and tokenizer_config.json names
# PreTrainedTokenizerFast, the class that adds nothing to tokenizer.json. For model types in the list
# MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS of models/auto/tokenization_auto.py, qwen2 among them, AutoTokenizer takes the class that
# is registered for the model type. Qwen2Tokenizer keeps the vocabulary and puts Qwen's normalizer (NFC) and Qwen's way of splitting
# in the place of those that are described: text becomes other tokens than the model was trained with, without a message. Beside
# model_type qwen3, which is not in that list, the named class is taken. PreTrainedTokenizerFast.from_pretrained reads the file as
# it stands in both.
#
# Here: "e" and a combining accent, two characters and three bytes, which NFC makes one character of two bytes.
#
# Seen (Python 3.11), the number of tokens of that text:
#   qwen2  Qwen2Tokenizer     2 tokens; PreTrainedTokenizerFast.from_pretrained 3; tokenizers.Tokenizer.from_file 3
#   qwen3  TokenizersBackend  3 tokens; PreTrainedTokenizerFast.from_pretrained 3; tokenizers.Tokenizer.from_file 3
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.19.0 jinja2==3.1.6
cat > "$work/load.py" <<'PROGRAM'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "e\u0301"
SEEN = {"qwen2": ("Qwen2Tokenizer", 2, 3, 3), "qwen3": ("TokenizersBackend", 3, 3, 3)}


def found(directory: Path, model_type: str) -> tuple[str, int, int, int]:
    directory.mkdir(parents=True)
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    described = Tokenizer(models.BPE(vocab=letters, merges=[]))
    described.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    described.decoder = decoders.ByteLevel()
    described.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.19.0"}))
    auto = AutoTokenizer.from_pretrained(directory)
    plain = PreTrainedTokenizerFast.from_pretrained(directory)
    count = [len(each.encode(TEXT, add_special_tokens=False)) for each in (auto, plain)]
    return type(auto).__name__, *count, len(described.encode(TEXT, add_special_tokens=False).ids)


wrong = 0
for model_type, seen in SEEN.items():
    now = found(Path(sys.argv[1]) / model_type, model_type)
    print(model_type, *now)
    wrong += now != seen
print("as described: the named class is not taken for qwen2" if not wrong else "changed")
sys.exit(bool(wrong))
PROGRAM
"$work/venv/bin/python" -W ignore "$work/load.py" "$work/models"
