#!/bin/sh
# transformers 5.19.0: a tokenizer read from a GGUF file splits text as GPT-2 does where the file names a way of splitting it lacks.
#
# `tokenizer.ggml.pre` names the way in which text is cut into words before the merges of a byte-level vocabulary apply. transformers
# has a table of these names. llama-bpe and qwen2 are in it; smollm (SmolLM and SmolLM2), starcoder, refact, command-r, codeshell and
# exaone are not. For these GPT-2's pattern stays, as if the file had no such key, and nothing is said. llama.cpp cuts each digit off
# first for all six, as Digits and ByteLevel of the tokenizers package do. White space before a digit then is one word, whereas
# GPT-2's pattern keeps the last character of it apart. So numbered lists, tables and indented numbers get other token ids than the
# model was trained with and than llama.cpp gives to the same file; decoded text is the same, and no error comes.
#
# Here: a file of a llama architecture without tensors, written by gguf 0.19.0, with 256 byte tokens and one merge, of two newlines.
#
# Seen (Python 3.11), for "List:\n\n1. a" from the colon on:
#   smollm and the other five, and a file without the key    : Ċ Ċ 1 . Ġ a
#   Digits and ByteLevel over the same vocabulary and merges  : ĊĊ 1 . Ġ a
#   llama-bpe and qwen2, which are in the table               : ĊĊ 1 . Ġ a
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.19.0 tokenizers==0.23.2 gguf==0.19.0 torch==2.13.0 numpy==2.3.5
cat > "$work/split.py" <<'PROGRAM'
import sys
from pathlib import Path

from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

TEXT = "List:\n\n1. a"
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
IN_TABLE = ("llama-bpe", "qwen2")
END = "<|endoftext|>"
MERGE = ("Ċ", "Ċ")  # a newline in the alphabet of byte-level vocabularies
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(MERGE), END]
NORMAL, CONTROL = 1, 3


def write_model(path: Path, pre: str | None) -> None:
    """Write a GGUF file whose vocabulary is TOKENS, and which names `pre` as its way of splitting."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([NORMAL] * (len(TOKENS) - 1) + [CONTROL])
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_bos_token_id(TOKENS.index(END))
    writer.add_eos_token_id(TOKENS.index(END))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def read_by_transformers(directory: Path, pre: str | None) -> list[str]:
    """Tokens of TEXT behind the colon, of the tokenizer that transformers makes from such a file."""
    directory.mkdir()
    write_model(directory / "model.gguf", pre)
    return behind_colon(AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf").tokenize(TEXT))


def split_digits_first() -> list[str]:
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(TOKENS)}, merges=[MERGE]))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    return behind_colon(tokenizer.encode(TEXT).tokens)


def behind_colon(tokens: list[str]) -> list[str]:
    return tokens[tokens.index(":") + 1 :]


root = Path(sys.argv[1])
found = {pre: read_by_transformers(root / str(pre), pre) for pre in (None, *DIGITS_FIRST, *IN_TABLE)}
right = split_digits_first()
for pre, tokens in found.items():
    print(f"{pre or '(no key)':12} {' '.join(tokens)}")
print(f"{'digits first':12} {' '.join(right)}")
apart, joined = list("ĊĊ1.Ġa"), ["ĊĊ", *"1.Ġa"]
expected = {None: apart, **dict.fromkeys(DIGITS_FIRST, apart), **dict.fromkeys(IN_TABLE, joined)}
sys.exit(not (found == expected and right == joined))
PROGRAM
mkdir "$work/models"
if "$work/venv/bin/python" "$work/split.py" "$work/models"; then
    echo "as described: names that are not in the table mean GPT-2"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
