"""Model families on a real SGLang server on a CPU: log-probs from disk, and after new weights by broadcast.

Qwen3 is in test_sglang.py, Qwen3-MoE in test_sglang_ends.py; DeepSeek-V3 is not served on CPUs (docs/models.md).
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from ctpo_megatron.toy.model import make_toy_model
from tests.support.engines import load_reference, start_server
from tests.support.families import MODELS
from tests.support.publishing import check_against, perturbed, publishing, sample
from tests.support.tiny import write_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", *(pytest.param(name, marks=pytest.mark.long) for name in ("mistral", "mixtral", "glm4_moe"))]
)
def test_log_probs(name: str, forks: Path, tmp_path: Path) -> None:
    """Those of transformers, and those of other weights once these were published."""
    directory = servable(tmp_path, name)
    running = start_server(directory, tmp_path / "server.log", forks=forks)

    async def scenario() -> None:
        old, new = load_reference(directory), perturbed(directory, seed=2)
        async with publishing(running, new) as (client, publisher):
            check_against(old, await sample(client, 0.7), 0.7)
            await publisher.publish(1)
            check_against(new, await sample(client, 0.7), 0.7)

    try:
        asyncio.run(scenario())
    finally:
        running.server.stop()


def servable(root: Path, name: str) -> Path:
    """A tiny model of the family with the toy tokenizer and its vocabulary."""
    tokenizer, directory = make_toy_model(root / "tokenizer", seed=1), root / name
    options = dict(MODELS[name])
    if "moe_intermediate_size" in options:
        options["moe_intermediate_size"] = 64  # as `engine.layout` wants it on CPUs
    words = {"vocab_size": 264, "eos_token_id": 257, "bos_token_id": None, "pad_token_id": 256, "max_position_embeddings": 4096}
    write_model(directory, name, options=options | words)
    for file in TOKENIZER:
        shutil.copyfile(tokenizer / file, directory / file)
    return directory
