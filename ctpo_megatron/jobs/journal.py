"""The journal of a run, and what its attempts are made of besides weights and prompts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import storing
from ctpo_megatron.record.events import Emit
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.rollout.journal import Journal


def open_journal(
    config: RunConfig, run_dir: Path, step: int, emit: Emit, storage: Storage, *, keep: bool, recipes: Mapping[str, str]
) -> Journal | None:
    """Returns the journal of a run that begins at training step `step`, None where the configuration wants none.

    `recipes`: of its benchmarks (`jobs.evaluations.recipes`).
    `keep`: whether what is there already belongs to this run; otherwise it is deleted.
    """
    directory = run_dir / "journal"
    if not keep and directory.exists():
        with storing(directory):
            shutil.rmtree(directory)
    if config.checkpoint.journal == "none":
        return None
    return Journal(directory, recipe(config), recipes=recipes, step=step, emit=emit, storage=storage)


def recipe(config: RunConfig) -> str:
    """Returns a digest of all settings that change what an attempt in training says or is worth, beside weights and prompt."""
    others = ("group_size", "concurrency", "deadline_s", "engine", "retries", "failed_share", "failed_window", "dynamic")
    where = dict.fromkeys(("host", "port", "workers", "per_worker", "start_timeout_s", "log_kb"), True)  # an agent is played
    settings = {
        "rollout": config.rollout.model_dump(mode="json", exclude={**dict.fromkeys(others, True), "agent": where}),
        "chat": config.model.model_dump(mode="json", exclude={"path"}),
        "top_k": config.algorithm.top_k,
        "routing_replay": config.moe.routing_replay,
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
