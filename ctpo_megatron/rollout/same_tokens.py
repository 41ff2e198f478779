"""Whether the tokenizer that transformers loaded is the one that the model's tokenizer.json describes.

transformers 5 picks a class by config.json and tokenizer_config.json, and some classes put parts of their own in the place of
what tokenizer.json says. Then text becomes other tokens than those that the model was trained on, and nothing fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctpo_megatron.errors import ModelError

# spaces, numbers, case, contractions, code, other scripts, composed letters, symbols of several bytes. None begins with a space:
# transformers' class for sentencepiece writes one space less there than older published files say, and nothing else differs.
PROBES = (
    "Hello world, it's the year 2024: 17 + 25 = 42.",
    "two  spaces,\ttabs\n\nand lines \n  end ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "Let $\\frac{12345}{678} \\leq \\sqrt{x^2}$; then \\boxed{-3.5e-7}.",
    "Größe, naïve café, ΑΒΓ абв 你好，世界。 こんにちは 안녕 مرحبا שלום नमस्ते",
    "e\u0301 \u00a0\u200b ① ﬁ 😀👩‍👩‍👧 ½ € CamelCaseWord don'T WE'LL 1,000,000.5",
)


def check_same_tokens(directory: Path, tokenizer: Any) -> None:
    """Compare the ids of `PROBES` from the loaded `tokenizer` with those from `directory`/tokenizer.json, where there is one.

    Raises ModelError that shows the first text with other ids, and says why that may be.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return  # there is nothing to compare with
    from tokenizers import Tokenizer

    try:
        described = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more telling
        raise ModelError(f"{file} is not a tokenizer that the tokenizers library can read: {error}") from error
    described.no_truncation()
    described.no_padding()
    for text in PROBES:
        loaded = list(tokenizer.encode(text, add_special_tokens=False))
        written = described.encode(text, add_special_tokens=False).ids
        if loaded != written:
            raise ModelError(_message(directory, tokenizer, text, loaded, written))


def _message(directory: Path, tokenizer: Any, text: str, loaded: list[int], written: list[int]) -> str:
    pairs = enumerate(zip(loaded, written, strict=False))
    first = next((at for at, (mine, theirs) in pairs if mine != theirs), min(len(loaded), len(written)))
    there = slice(first, first + 3)
    return (
        f"{directory}: transformers has loaded another tokenizer than tokenizer.json describes, as {type(tokenizer).__name__}. "
        f"{text!r} becomes {len(loaded)} tokens, by tokenizer.json {len(written)}; from number {first} on they are "
        f"{loaded[there]} ... instead of {written[there]} ... Likely causes: config.json lacks model_type or "
        "transformers_version, so that transformers takes it for another model; tokenizer_class in tokenizer_config.json names "
        'another class (try "PreTrainedTokenizerFast"); fix_mistral_regex is set there for a tokenizer that is sound without.'
    )
