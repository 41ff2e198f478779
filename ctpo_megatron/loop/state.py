"""The driver's part of a checkpoint: how far a run is, as far as no rank of the trainer knows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ctpo_megatron.errors import CheckpointError

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class RunState:
    """A run after `step` training steps. All of it was counted as it happened; nothing follows from present settings."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    step: Count
    groups: Count  # admitted for these steps: the number of the next group
    cursor: dict[str, Any]  # the sampler behind the last prompt of these steps, see `PromptSampler.restore`
    accuracies: dict[Count, float]  # held-out accuracy by the number of training steps before it
    owed: tuple[Count, ...] = ()  # evaluations that had begun beside training and were not done, by the steps before them
    samples: Count | None = None  # attempts that these steps were trained on; None: the release that began the run did not count

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
