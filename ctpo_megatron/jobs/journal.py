"""The journal of a run, and what its attempts are made of besides weights and prompts."""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.rewards import FunctionReward, RewardSection, parts, verdict_settings
from ctpo_megatron.config.tools import UNSAID
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
    others = {"group_size", "concurrency", "deadline_s", "engine", "retries", "dynamic", "reward"}
    others |= {"failed_share", "failed_window", "undecided_share"}
    where = dict.fromkeys(("host", "port", "workers", "per_worker", "start_timeout_s", "log_kb"), True)  # an agent is played
    left_out: dict[str, Any] = {**dict.fromkeys(others, True), "tool": UNSAID, "agent": where}
    settings = {
        "rollout": config.rollout.model_dump(mode="json", exclude=left_out),
        "reward": reward_recipe(config.rollout.reward),
        "chat": config.model.model_dump(mode="json", exclude={"path"}),
        "top_k": config.algorithm.top_k,
        "routing_replay": config.moe.routing_replay,
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def reward_recipe(config: RewardSection) -> Any:
    """Returns all that verdicts depend on, as JSON values: settings, and of a user's function the file that it is in.

    What that file imports is not looked at.
    """
    functions = [part.function for _, part in parts(config) if isinstance(part, FunctionReward)]
    return [verdict_settings(config), [_source_digest(each) for each in functions]]


def _source_digest(function: str) -> str:
    """Returns a digest of the file of `package.module:function`, found without importing anything; empty where there is none."""
    name, found, places = "", None, [os.getcwd(), *sys.path]  # its process is begun in this directory, which comes first there
    for part in function.partition(":")[0].split("."):
        name = f"{name}.{part}" if name else part
        found = importlib.machinery.PathFinder.find_spec(name, places)
        if found is None:
            return ""
        places = list(found.submodule_search_locations or [])
    if found is None or found.origin is None or not os.path.isfile(found.origin):
        return ""
    return hashlib.blake2b(Path(found.origin).read_bytes(), digest_size=8).hexdigest()
