"""Tokenizers with the templates of families, made once."""

from __future__ import annotations

import pytest

from ctpo_megatron.rollout.chat import ChatTokenizer
from tests.support.chats import loader


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return loader(lambda: tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="session")
def chat(chats) -> ChatTokenizer:
    return chats("qwen2.5")
