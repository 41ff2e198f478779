"""The chain is what it says it is: by transformers, by the tokenizer that rollouts use, and by its own shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.tools import extract_code
from ctpo_megatron.toy.chain import ANSWER_ID, END, PROGRAM_ID, Chain, make_chain_model

CHAIN = Chain(mean_turn=20, calls=0.3)


def test_log_probs_are_those_of_the_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_chain_model(tmp_path, CHAIN), dtype=torch.float32).eval()
    ids = [260, 97, 32, 122, PROGRAM_ID, END, 261, 52, 50, END, 260, 98, 99, ANSWER_ID, END]
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    found = [float(logp[place, token]) for place, token in enumerate(ids[1:])]
    expected = CHAIN.logp(ids[0], ids[1:])
    sampled = [place for place, token in enumerate(ids[1:]) if token != 261 and place not in (6, 7, 8, 9)]  # not a tool's text
    assert [found[place] for place in sampled] == pytest.approx([expected[place] for place in sampled], abs=1e-5)
    assert found[5] < -20
    for token in (97, PROGRAM_ID, ANSWER_ID, END, 260):
        assert sum(CHAIN.after(token).values()) == pytest.approx(1)


def test_its_words_are_a_program_and_an_answer(tmp_path: Path) -> None:
    chat = ChatTokenizer(make_chain_model(tmp_path, CHAIN))
    assert extract_code(chat.decode([97, 98, PROGRAM_ID, END])) == "print(6 * 7)\n"
    assert chat.decode([97, ANSWER_ID, END]) == "a\\boxed{42}"
    assert chat.stop_token_ids == [END]
