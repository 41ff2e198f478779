"""A trainer that only takes time: batches are planned as for the real one, and each costs what its slowest rank does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.data.balance import plan_micro_batches
from ctpo_megatron.data.packing import longest_sample
from ctpo_megatron.record.values import Values
from ctpo_megatron.simulation.host import Host
from ctpo_megatron.simulation.meter import Meter
from ctpo_megatron.simulation.speeds import Speeds, TrainerSpeed
from ctpo_megatron.types import Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class CountedBatch(TrainBatch):
    """One optimizer step of samples of which only the lengths are known."""

    lengths: tuple[int, ...] = ()


def counted_batches(
    groups: list[TrajectoryGroup], config: RunConfig, _attention_weight: float = 0.0, _spare: bool = False
) -> list[TrainBatch]:
    """Returns the optimizer steps of `groups` as `loop.train.make_batches` cuts them, with lengths in the place of tokens."""
    per_batch = len(groups) // config.train.optimizer_steps
    cut = [groups[first : first + per_batch] for first in range(0, len(groups), per_batch)]
    return [CountedBatch([], lengths=tuple(_length(each) for group in part for each in group.trajectories)) for part in cut]


def _length(trajectory: Trajectory) -> int:
    return len(trajectory.prompt_ids) + trajectory.response_length - 1


def optimizer_step_s(
    lengths: tuple[int, ...], speed: TrainerSpeed, parallel: ParallelConfig, max_tokens: int, attention_weight: float
) -> float:
    """Returns the seconds of one optimizer step over samples of `lengths` tokens.

    `attention_weight`: what micro-batches are balanced by, see `data.balance`; 0: tokens.
    """
    plan = plan_micro_batches(
        lengths,
        capacity=longest_sample(parallel, max_tokens),
        dp=parallel.dp,
        multiple=parallel.pp if parallel.vpp > 1 else 1,
        attention_weight=attention_weight,
    )
    costs = [[sum(lengths[i] + speed.attention * lengths[i] ** 2 for i in members) for members in rank] for rank in plan]
    slowest = max(sum(cost) * speed.token_s + len(cost) * speed.micro_batch_s for cost in costs)
    waiting = (parallel.pp - 1) / (parallel.vpp * len(plan[0]))  # of the pipeline's stages, as `planning.batches` has it
    return slowest * (1 + waiting) + speed.optimizer_s


class SimulatedTrainer:
    """All ranks of the trainer, seen as one."""

    def __init__(self, config: RunConfig, speeds: Speeds, host: Host, meter: Meter, attention_weight: float = 0.0) -> None:
        self._config, self._speeds, self._host, self._meter = config, speeds, host, meter
        self._attention_weight = attention_weight
        self.busy_s = 0.0

    async def update(self, batches: list[TrainBatch], version: int) -> Values:
        """Return after the time that the optimizer steps of `batches` take."""
        parallel, tokens = self._config.parallel, self._config.train.max_tokens_per_micro_batch
        seconds = self._speeds.trainer.step_s
        with self._meter:
            for batch in batches:
                assert isinstance(batch, CountedBatch)
                speed = self._speeds.trainer
                seconds += optimizer_step_s(batch.lengths, speed, parallel, tokens, self._attention_weight)
        await self._host.work(seconds, self._speeds.trainer_cores)
        self.busy_s += seconds
        return {}

    async def supervise(self, batch: TrainBatch) -> Values:
        """Raise: there is no supervised training here."""
        raise NotImplementedError

    async def assess(self, batch: TrainBatch) -> Values:
        """Raise: there is no supervised training here."""
        raise NotImplementedError

    async def save(self, directory: Path, *, background: bool) -> None:
        """Raise: checkpoints are not simulated."""
        raise NotImplementedError

    async def save_weights(self, directory: Path) -> None:
        """Raise: checkpoints are not simulated."""
        raise NotImplementedError

    async def settle(self) -> None:
        """Raise: checkpoints are not simulated."""
        raise NotImplementedError

    async def load(self, directory: Path) -> None:
        """Raise: checkpoints are not simulated."""
        raise NotImplementedError

    async def save_hf(self, directory: Path) -> None:
        """Raise: checkpoints are not simulated."""
        raise NotImplementedError
