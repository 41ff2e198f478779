"""What a checkpoint takes while it is made: memory of one trainer rank, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.planning.groups import expert_data_parallel
from ctpo_megatron.planning.parameters import Parameters
from ctpo_megatron.planning.work import FLOAT

STATES = 3  # of each parameter: itself and two moments, stored in float32 whatever the optimizer keeps
COPIES = 2  # of cluster.keepers.shelf: a test holds them equal
GATHERED = 2**26  # numbers; of mcore.checkpoint.gathering, which needs torch: a test holds them equal


@dataclass(frozen=True, slots=True)
class Saving:
    """Memory of a save; training stands while it is gathered, and goes on while it is written."""

    gpu: int  # beside what stays on the GPU; activations are not there at that moment
    gathering: int  # in the host's memory
    writing: int  # in the host's memory, until the checkpoint is on the disk

    @property
    def kept(self) -> int:
        """Returns the bytes of this rank's parts of copies in memory where these are kept: the last whole one, and the next."""
        return COPIES * self.writing


def plan_saving(parameters: Parameters, parallel: ParallelConfig, element: int) -> Saving:
    """What a rank with `parameters` takes: it gathers the states of all of them, and writes its share of states and weights.

    `element`: bytes of a weight.
    """
    largest = max(parameters.dense, parameters.experts)
    writing = rank_share(parameters, parallel) * (STATES * FLOAT + element)
    # what the other ranks give and what this one gives: with few ranks nearly as much again
    return Saving(2 * FLOAT * min(GATHERED, largest), parameters.total * STATES * FLOAT + writing, writing)


def rank_share(parameters: Parameters, parallel: ParallelConfig) -> int:
    """Parameters whose states a rank keeps: shared out over dp * cp, those of experts over the ranks that hold the same ones.

    megatron cuts its buffers at multiples of 128 numbers, so a rank's share may be larger by as much per bucket.
    """
    return -(-parameters.dense // (parallel.dp * parallel.cp)) - (-parameters.experts // expert_data_parallel(parallel))
