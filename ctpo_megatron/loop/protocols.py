"""What the loop needs from the rest of the system."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.record.values import Values
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.types import Composition, Fate, GroupId, Prompt, TrajectoryGroup


class Trainer(Protocol):
    """All ranks of the trainer, seen as one."""

    async def update(self, batches: list[TrainBatch], version: int) -> Values:
        """One optimizer step per batch on trajectories of policy `version`. Returns reduced statistics.

        Raises UpdateAbandoned where one was not applied because something was not finite; then the ones after it were not tried.
        """
        ...

    async def supervise(self, batch: TrainBatch) -> Values:
        """One optimizer step of supervised training. Raises as `update` does."""
        ...

    async def assess(self, batch: TrainBatch) -> Values:
        """Returns the supervised loss of a batch, as `supervise` has it, with the weights as they are. Nothing is trained."""
        ...

    async def save(self, directory: Path, *, background: bool) -> None:
        """Save all ranks' state as the checkpoint `directory`, which `checkpoints.files.begin_checkpoint` began.

        `background`: returns when it is copied; then `settle`.
        """
        ...

    async def save_weights(self, directory: Path) -> None:
        """Save the weights alone as the checkpoint `directory`, which was begun, while no other save is in flight.

        Returns when it is verified and has its name.
        """
        ...

    async def settle(self) -> None:
        """Wait until the save in flight is verified and has its name; raises what went wrong with it."""
        ...

    async def load(self, directory: Path) -> None:
        """Go on from a checkpoint, after comparing all its files with their hashes. Raises DamagedCheckpoint."""
        ...

    async def save_hf(self, directory: Path) -> None:
        """Write the model in Hugging Face format, adapters merged, and these besides to `adapter` beside it, in peft's."""
        ...


class Copy(Protocol):
    """A copy of the trainer's state that other processes hold all of."""

    @property
    def step(self) -> int:
        """The training steps that it knows of."""
        ...

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    @property
    def scheduler_steps(self) -> int:
        """The optimizer steps that were made."""
        ...

    @property
    def stood_s(self) -> float:
        """Seconds for which the trainer did nothing else."""
        ...


class Keepers(Protocol):
    """Processes that hold copies of the trainer's state, and outlive its ranks."""

    async def copy(self, step: int, stays: Any) -> Copy:
        """Returns a whole copy of the trainer, which has done `step` training steps; `stays`, the one before, goes only then.

        Raises CopyLost where it did not come about, TrainerLost for a rank that is lost.
        """
        ...

    async def retain(self, copy: Any) -> None:
        """Let everything go but `copy`. Raises CopyLost where one of them does not answer."""
        ...

    def holds(self, copy: Any) -> bool:
        """Whether all of a copy is there still, as far as is known."""
        ...

    async def recall(self, copy: Any) -> None:
        """The trainer, which has just been started, takes its state from `copy`. Raises CopyLost, and it is unchanged then."""
        ...


class Publisher(Protocol):
    """Brings the trainer's weights to the inference servers."""

    @property
    def digest(self) -> str:
        """Tells the weights that were published last from all others. Raises RuntimeError before there are any."""
        ...

    async def publish(self, version: int) -> dict[str, float]:
        """After it returns every new token is sampled by `version`. Returns scalars: seconds by phase, servers."""
        ...

    async def offload(self) -> None:
        """Servers that share the trainer's memory give it back until the next `publish`; others are left alone."""
        ...

    async def heal(self) -> None:
        """Bring servers that came late or failed to the current version, which the trainer must still hold."""
        ...


class Busy(Protocol):
    """How long servers have something to do."""

    def begin(self) -> None:
        """Count from now on."""
        ...

    def metrics(self) -> dict[str, float]:
        """Returns each server's share of the time since then, under the record's names."""
        ...


class Rollouts(Protocol):
    """Makes judged trajectories."""

    async def group(
        self, prompt: Prompt, group: GroupId, *, size: int, sampling: Sampling, aside: bool = False, keep_failed: bool = False
    ) -> TrajectoryGroup:
        """Returns `size` attempts at one prompt, called by `group`.

        `aside`: by servers that are set aside (`ServersAside`). `keep_failed`: an attempt that failed too often is part of what
        is returned, and ends its group; otherwise its error is raised.
        """
        ...

    async def interrupt(self) -> None:
        """Stop sampling, and keep all attempts as they are where others will find them."""
        ...


class Teachers(Protocol):
    """What says of finished attempts how likely others would have written them."""

    async def teach(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """Returns the group with `Turn.teacher_logp`; as a failed group where no teacher answered."""
        ...

    def metrics(self) -> dict[str, float]:
        """Returns scalars of the time since they were last taken, under the record's names."""
        ...


class Decisions(Protocol):
    """What a run had decided before, of which only time knew; it is followed as long as its weights are the same."""

    def planned(self, step: int) -> Composition | None:
        """Returns how training step `step`, from 0, was made; None where it was not, or with other weights."""
        ...

    def fate(self, group: int) -> Fate | None:
        """Returns what became of a group; None where that is not known."""
        ...

    def decided(self, made: Composition) -> None:
        """Keep how a step is made. Raises StorageError."""
        ...

    def drop_plans(self, step: int) -> None:
        """Forget how `step` and those after it were made: they cannot be made so again."""
        ...


class ServersAside(Protocol):
    """Servers that are kept out of publications for a while, with the weights that they have."""

    def set_aside(self, count: int) -> int:
        """Set up to `count` servers aside, as long as one is left to train with; returns how many these are."""
        ...

    def give_back(self) -> None:
        """Let them take the newest weights and serve as all others. Safe to call twice."""
        ...
