"""Who wrote what, as `ctpo data` shows it, by chat templates in the manner of the families that users bring."""

from __future__ import annotations

from datetime import date

import pytest

from ctpo_megatron.config.model import ChatConfig
from ctpo_megatron.data.sft import as_samples
from ctpo_megatron.jobs.data_findings import demonstration_rendered, prompt_rendered, tool_turn
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.types import Prompt
from tests.support import chat_models as of

SETTINGS = ChatConfig(chat_date=date(2026, 1, 31))
FAMILIES = {
    "qwen2.5": (of.QWEN25, SETTINGS),
    "qwen2.5 base": (of.QWEN25_BASE, ChatConfig(stop_tokens=("<|im_end|>",))),
    "qwen3": (of.QWEN3, ChatConfig()),
    "llama 3": (of.LLAMA3, SETTINGS),
    "glm 4.5": (of.GLM45, ChatConfig()),
    "deepseek v3": (of.DEEPSEEK_V3, ChatConfig()),
    "mistral": (of.MISTRAL, ChatConfig()),
    "gemma": (of.GEMMA, ChatConfig()),
}
ASSISTANT, QUESTION = "I compute it.", "user: what is 3 + 4?"


@pytest.fixture(scope="module", params=FAMILIES)
def chat(request, tmp_path_factory) -> ChatTokenizer:
    family, config = FAMILIES[request.param]
    return ChatTokenizer(family.write(tmp_path_factory.mktemp("model")), config)


def test_a_prompt_is_cut_where_its_authors_change(chat):
    talk = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "user"}, {"role": "user", "content": QUESTION})
    found = prompt_rendered(Prompt(0, talk, "7"), chat)
    assert "".join(part.text for part in found.parts) == chat.decode(chat.prompt_ids(talk), special=True)
    said = [(part.author, part.text) for part in found.parts if part.author != "template"]
    assert said == [("user", "hi"), ("assistant", "user"), ("user", QUESTION)]


def test_a_demonstration_shows_its_mask_its_ends_and_the_tool(chat):
    talk = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ASSISTANT},
        {"role": "tool", "content": "seven"},
        {"role": "assistant", "content": "\\boxed{7}"},
    ]
    (sample,) = as_samples("row 0", 0, talk, 1, chat)
    found = demonstration_rendered(sample, "row 0", talk, None, chat, "last")
    ids = [*sample.input_ids[:1], *sample.labels]
    taught = [id_ for id_, trained in zip(ids[1:], sample.mask, strict=True) if trained]
    assert "".join(part.text for part in found.parts if part.trained) == chat.decode(taught, special=True)
    ends = [part.text for part in found.parts if part.ends_turn]
    assert len(ends) == 2
    assert set(ends) <= {chat.decode([id_], special=True) for id_ in chat.stop_token_ids}
    words = [part.text for part in found.parts if part.author == "assistant" and not part.ends_turn]
    assert words[0].endswith(ASSISTANT)
    assert words[1].endswith("\\boxed{7}")
    others = [(part.author, part.text) for part in found.parts if part.author in ("user", "tool")]
    assert others[0] == ("user", QUESTION)
    assert [author for author, _ in others] == ["user", "tool"]
    assert others[1][1].strip('"') == "seven"


def test_the_place_of_a_tools_output_is_found(chat):
    parts = tool_turn(chat)
    assert [part.text for part in parts if part.author == "tool"] == [""]
    assert parts[-1].author == "template"
