"""What to change when a run does not fit: the usual changes are tried one at a time, and what they bring is told."""

from __future__ import annotations

from pydantic import ValidationError

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import ConfigError
from ctpo_megatron.jobs.topology import planned_run
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.batches import plan_batches
from ctpo_megatron.planning.memory import GIB, plan_stages

WORTH = 0.02  # of the GPU's memory; a change that brings less is not told


def helpful_changes(config: RunConfig, shape: ModelShape, gpu_gib: float) -> list[str]:
    """Allowed changes that lower the fullest rank's memory, the most helpful first: `parallel.pp=4: 61.0 GiB, fits`."""
    now = _fullest(config, shape)
    found = []
    for changes in _candidates(config):
        try:
            changed = _with(config, changes)
            check_layout(shape, changed.parallel)
        except (ConfigError, ValidationError):
            continue
        needed = _fullest(changed, shape)
        if now - needed >= WORTH * gpu_gib:
            words = " ".join(f"{key}={value}" for key, value in changes.items())
            found.append((needed, f"{words}: {needed:.1f} GiB{', fits' if needed <= gpu_gib else ''}"))
    return [text for _, text in sorted(found)]


def _candidates(config: RunConfig) -> list[dict[str, object]]:
    parallel, tokens = config.parallel, config.train.max_tokens_per_micro_batch
    doubled = [{f"parallel.{axis}": 2 * getattr(parallel, axis)} for axis in ("tp", "pp", "dp", "ep", "etp")]
    return [
        *doubled,
        {"parallel.cp": 2 * parallel.cp, "train.max_tokens_per_micro_batch": -(-tokens // 2)},
        {"train.recompute": "full"},
        {"optimizer.cpu_offload": 1.0},
    ]


def _with(config: RunConfig, changes: dict[str, object]) -> RunConfig:
    values = config.model_dump(exclude={"elastic"})  # other layouts are not asked about
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return RunConfig.model_validate(values)


def _fullest(config: RunConfig, shape: ModelShape) -> float:
    """GiB of the fullest trainer rank."""
    run = planned_run(config)
    micro_batches = plan_batches(run).packings[0].micro_batches
    return max(stage.memory.total for stage in plan_stages(run, shape, micro_batches)) / GIB
