"""Model directories with a tokenizer and a chat template in the manner of published families, small enough for unit tests.

The templates are our own and shorter than the published ones; what they write around a conversation, and where they refuse one,
is as the families do it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctpo_megatron.toy.model import _byte_symbols

TEMPLATES = Path(__file__).parent / "chat_templates"
THINK = ("<think>", "</think>")


def source(template: str) -> str:
    """The text of a template: of the file of that name, or `template` itself where it is Jinja."""
    return template if "{" in template else (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Family:
    """`template` is a file of chat_templates/ without its ending, or a template. `special` are tokens, the first of which the
    tokenizer names as eos; `stops` are those of generation_config.json."""

    template: str
    special: tuple[str, ...]
    stops: tuple[str, ...]
    plain: tuple[str, ...] = THINK  # tokens that are not special

    def write(self, directory: Path, **changes: Any) -> Path:
        """A model directory of this family; `changes` replace its fields."""
        family = Family(**{**self.__dict__, **changes})
        directory.mkdir(parents=True, exist_ok=True)
        symbols = _byte_symbols()
        merges = [("Ċ", "Ċ"), ("Ġ", "Ġ")]  # so that a token can reach over the seam between a prompt and an answer
        vocab = {symbol: byte for byte, symbol in enumerate(symbols)} | {"ĊĊ": 256, "ĠĠ": 257}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(family.special))
        backend.add_tokens(list(family.plain))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=family.special[0], clean_up_tokenization_spaces=False
        )
        tokenizer.save_pretrained(directory)
        (directory / "chat_template.jinja").write_text(source(family.template), encoding="utf-8")
        ids = [tokenizer.convert_tokens_to_ids(stop) for stop in family.stops]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return directory


# a tool speaks in the user's turn; the base model's tokenizer and generation_config.json know <|endoftext|> only
QWEN25 = Family("qwen2.5", ("<|im_end|>", "<|im_start|>", "<|endoftext|>"), ("<|im_end|>", "<|endoftext|>"))
QWEN25_BASE = Family("qwen2.5", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<|endoftext|>",))
# reasoning of turns before the last question is left out, and the last turn always has a block for it
QWEN3 = Family("qwen3", QWEN25.special, QWEN25.stops)
# its models that always think: a generation begins inside of the block
QWEN3_THINKING = Family("qwen3-thinking", QWEN25.special, QWEN25.stops)
# a generation begins inside of the block, and no rendering of a finished turn has its reasoning
DEEPSEEK_R1 = Family("deepseek-r1", ("<|end|>", "<|begin|>", "<|User|>", "<|Assistant|>"), ("<|end|>",))
# Llama 3.1 to 3.3: words are trimmed, a tool's output is JSON in the role ipython, and the prompt has a date
LLAMA3 = Family(
    "llama-3",
    ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
)
# nothing ends a turn but the token of the next role
GLM45 = Family(
    "glm-4.5",
    ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ("<|endoftext|>", "<|user|>", "<|observation|>"),
)
# a second output begins otherwise than the first, and an answer to a tool has no role token
DEEPSEEK_V3 = Family(
    "deepseek-v3",
    (*DEEPSEEK_R1.special, "<|outputs_begin|>", "<|output_begin|>", "<|output_end|>", "<|outputs_end|>"),
    ("<|end|>",),
)
# nothing begins an assistant's turn; roles must alternate, and there is none for the system in the first versions
MISTRAL = Family("mistral", ("</s>", "<s>", "[INST]", "[/INST]"), ("</s>",))
# its later versions put the system's words into the last question, wherever that is
MISTRAL_LAST = Family("mistral-last", MISTRAL.special, MISTRAL.stops)
# the assistant is the model, and roles must alternate
GEMMA = Family("gemma", ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"))
# channels; <|return|> ends the last turn, <|end|> those before, and only a call lets a tool speak
HARMONY = Family(
    "gpt-oss",
    ("<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"),
    ("<|return|>", "<|endoftext|>", "<|call|>"),
)
