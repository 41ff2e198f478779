"""The toy task's demonstrations, as the tokenizer of a rollout reads them."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.toy.model import CALL_WORDS, CALLS_TEMPLATE, make_toy_model
from ctpo_megatron.toy.task import Problem, demonstration


def test_demonstrations_can_call_a_tool_by_its_name(tmp_path: Path) -> None:
    """As the template of `make_toy_model(chat_template=CALLS_TEMPLATE)` writes it, which SGLang's Hermes parser reads."""
    chat = ChatTokenizer(make_toy_model(tmp_path / "model", seed=1, words=CALL_WORDS, chat_template=CALLS_TEMPLATE))
    problem = Problem("Twelve times three?", 0, (120, 300), "36000")
    prompt, parts = chat.demonstration(demonstration(problem, right=True, call=True), 1)
    assert chat.decode(prompt, special=True) == "<|user|>Twelve times three?<|im_end|><|assistant|>"
    asks = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "120*300"}}\n</tool_call>'
    assert [(role, chat.decode(ids)) for role, ids in parts] == [
        ("assistant", asks),
        ("tool", "36000"),
        ("assistant", "\\boxed{36000}"),
    ]
    assert len(parts[0][1]) < len(asks)  # its marks are tokens
