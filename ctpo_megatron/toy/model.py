"""A model directory small enough for a laptop: byte-level tokenizer, short chat template, random weights.

It has every file a real one has, so nothing downstream knows that this is a toy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from ctpo_megatron.checkpoints.directories import share_files
from ctpo_megatron.errors import ConfigError, near_miss

Kind = Literal["qwen3", "qwen3_moe", "qwen2", "llama"]

# One token per role keeps conversations short. The unused ones make the vocabulary 264, which 2, 4 and 8 ranks can share.
PAD, END_OF_TURN = "<|pad|>", "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (PAD, END_OF_TURN, *(f"<|{role}|>" for role in ROLES), "<|unused_0|>", "<|unused_1|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# With calls in the format of Hermes and Qwen, whose marks are tokens. It does not write which tools there are: a model this small
# knows the one that it was taught.
CALL_WORDS = ("<tool_call>", "</tool_call>")
CALLS_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>\n{\"name\": \"' + call['function']['name'] "
    "+ '\", \"arguments\": ' }}{% if call['function']['arguments'] is string %}{{ call['function']['arguments'] }}"
    "{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_POSITIONS = 4096


def make_toy_model(
    directory: str | Path,
    kind: Kind = "qwen3",
    *,
    seed: int,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 8,
    kv_heads: int = 4,
    ffn: int = 384,
    experts: int = 4,
    experts_top_k: int = 2,
    tie_embeddings: bool = False,
    init_std: float = 0.02,
    rope: dict[str, Any] | None = None,
    words: tuple[str, ...] = (),
    chat_template: str = CHAT_TEMPLATE,
) -> Path:
    """Write a random model of about 0.4 million parameters in Hugging Face format (float32) and return its directory.

    The same arguments write the same bytes. `experts` and `experts_top_k` matter only to `qwen3_moe`, where each expert has
    `ffn // experts_top_k` units. `rope` replaces the default `rope_parameters`. `words`: text that the last tokens of the
    vocabulary stand for, in place of the unused ones. Raises ConfigError for an unknown kind.
    """
    if kind not in get_args(Kind):
        raise ConfigError(
            f"kind {kind!r} of toy model; allowed are {', '.join(get_args(Kind))}.{near_miss(kind, get_args(Kind))}"
        )
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(words, chat_template)
    tokenizer.save_pretrained(target)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tie_embeddings,
        "initializer_range": init_std,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen2":
        del sizes["head_dim"]  # always hidden / heads there
    if kind == "qwen3_moe":
        sizes |= {"num_experts": experts, "num_experts_per_tok": experts_top_k, "moe_intermediate_size": ffn // experts_top_k}
        sizes |= {"norm_topk_prob": True}
    _save_model(target, kind, sizes, seed)
    return target


def _tokenizer(words: tuple[str, ...], chat_template: str) -> Any:
    """Byte b has id b; the special tokens follow, and `words` come last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = _byte_symbols()
    backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS[: len(SPECIAL_TOKENS) - len(words)]))
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        chat_template=chat_template,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """The printable character that the byte-level pre-tokenizer uses for each byte, in byte order.

    That is GPT-2's table: printable bytes stand for themselves, the others for the characters from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _save_model(target: Path, kind: Kind, sizes: dict[str, Any], seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **sizes)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = sizes["eos_token_id"]
    model.generation_config.pad_token_id = sizes["pad_token_id"]
    model.save_pretrained(target)
    share_files(target)
