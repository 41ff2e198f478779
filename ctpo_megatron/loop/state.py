"""The driver's part of a checkpoint: how far a run is, as far as no rank of the trainer knows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ctpo_megatron.errors import CheckpointError

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """A group that was admitted and has not ended: its number, `Prompt.key`, and the version of the weights by then."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    number: Count
    prompt: str
    version: Count


@dataclass(frozen=True, slots=True)
class Supervised:
    """What a run of `ctpo sft` knows besides. Losses are in nats per token; None: not measured yet."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    tokens: float = 0.0  # trained on
    smoothed: float | None = None  # loss of training
    best: float | None = None  # lowest held-out loss
    best_step: Count = 0  # after which it was measured
    waited: Count = 0  # measurements since


@dataclass(frozen=True)
class RunState:
    """A run after `step` training steps. All of it was counted as it happened; nothing follows from present settings."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step: Count
    groups: Count  # admitted when the last of these steps was made: the number of the next group
    cursor: dict[str, Any]  # the sampler behind the last prompt of these groups, see `PromptSampler.restore`
    accuracies: dict[Count, float]  # held-out accuracy by the number of training steps before it
    owed: tuple[Count, ...] = ()  # evaluations that had begun beside training and were not done, by the steps before them
    samples: Count | None = None  # attempts that these steps were trained on; None: the release that began the run did not count
    open: tuple[OpenGroup, ...] = ()  # of these groups, in the order of their numbers; they go on
    alarms: dict[str, Any] | None = None  # what these remember (`record.alarms`); None: they are to read all rows of the run
    supervised: Supervised | None = None  # of a run of `ctpo sft`, whose steps, groups and cursor are about demonstrations

    @property
    def oldest_group(self) -> int:
        """The lowest number of a group that may still be sampled."""
        return min((group.number for group in self.open), default=self.groups)

    def dump(self) -> dict[str, Any]:
        """Returns the state as JSON values, for `parse`."""
        return asdict(self) | {"accuracies": {str(step): accuracy for step, accuracy in sorted(self.accuracies.items())}}

    @classmethod
    def parse(cls, content: Any, where: str) -> RunState:
        """Returns the state that `dump` gave. Raises CheckpointError, beginning with `where`, for anything else."""
        try:
            return _ADAPTER.validate_json(json.dumps(content))  # of JSON, as its keys are texts
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors())
            raise CheckpointError(f"{where}: this is not the state of a run: {wrong}.") from error


_ADAPTER = TypeAdapter(RunState)
