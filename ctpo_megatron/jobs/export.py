"""The model that a command leaves behind."""

from __future__ import annotations

from pathlib import Path

from ctpo_megatron.loop.protocols import Trainer
from ctpo_megatron.rollout.chat import ChatTokenizer


async def export(trainer: Trainer, chat: ChatTokenizer, directory: Path) -> None:
    """Write the trainer's weights in Hugging Face format to `directory`, with what the configuration gave to `chat`."""
    await trainer.save_hf(directory)
    chat.save(directory)
