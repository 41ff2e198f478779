"""How weights travel to the servers, and the proof that they arrived."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ctpo_megatron.config.base import FilePath, Section

Quantization = Literal["fp8"]


class TransportSection(Section):
    """What the rest of the package may know of a transport without knowing which one it is."""

    needs_session: ClassVar[bool] = True  # an update session of SGLang is open while the weights arrive
    shares_devices: ClassVar[bool] = False  # servers run on the trainer's devices, one of their ranks on each, and have none else
    within_node: ClassVar[bool] = False  # weights do not leave the node that they are on
    sends_per_stage: ClassVar[bool] = False  # one rank of each pipeline stage sends all of it; see `models.owners`

    quantization: Quantization | None = None
    """fp8: servers keep the matrices of layers in fp8 blocks, which the trainer makes of its own weights when it publishes them
    (docs/precision.md). null: they keep the trainer's number format."""

    @property
    def servers_sleep(self) -> bool:
        """Whether the servers give back their memory while the trainer trains."""
        return False


class BroadcastTransport(TransportSection):
    """Weights go into SGLang through its update groups (NCCL, gloo on CPUs); no disk."""

    sends_per_stage = True  # each sender has a communicator with all servers, which takes memory on every GPU of theirs

    type: Literal["broadcast"] = "broadcast"
    bucket_mb: PositiveInt = 512
    """Weights gathered and sent at a time, by each sender; it holds two such buckets."""
    delta: bool = False
    """Send only tensors that differ bitwise from what the servers hold."""
    timeout_s: PositiveFloat = 600.0
    """How long one publication may take."""


class ColocatedTransport(TransportSection):
    """Trainer and servers on the same devices of one node: tensors are handed over in shared memory (CUDA IPC; files in memory on
    CPUs)."""

    shares_devices = True
    within_node = True

    type: Literal["colocated"] = "colocated"
    bucket_mb: PositiveInt = 512
    """Weights gathered and handed over at a time, by each sender; it holds two such buckets."""
    delta: bool = False
    """Hand over only tensors that differ bitwise from what the servers hold; needs `release: false`."""
    release: bool = True
    """Servers give back the memory of weights and KV cache while the trainer trains. Needs train.staleness 0."""
    timeout_s: PositiveFloat = 600.0
    """How long one publication may take."""

    @property
    def servers_sleep(self) -> bool:
        """`release`."""
        return self.release


class DiskTransport(TransportSection):
    """Weights are written as safetensors on a file system that trainer and servers share; for servers that are elsewhere."""

    needs_session = False

    type: Literal["disk"] = "disk"
    directory: FilePath
    """Where versions are written, the same path on every node: DIRECTORY/v000012 and so on."""
    bucket_mb: PositiveInt = 2048
    """Size of one file, and of the weights gathered at a time by each sender."""
    delta: bool = False
    """Write only tensors that differ bitwise from what the servers hold."""
    keep: PositiveInt = 2
    """Versions left on the disk, the newest."""
    timeout_s: PositiveFloat = 1800.0
    """How long one publication may take. A rank that writes nothing meanwhile is found by cluster.watch."""


Transport = Annotated[BroadcastTransport | ColocatedTransport | DiskTransport, Field(discriminator="type")]


class AttestConfig(Section):
    """The proof, after each publication, that the servers hold the weights that were sent. It cannot be turned off."""

    canary_tolerance: PositiveFloat | None = None
    """Largest allowed mean difference between the trainer's and a server's log-probs of the canary prompt's tokens. null: for
    bfloat16 0.1, for mixtures of experts 0.15 with moe.routing_replay and 0.75 without; for float32 0.0002, and 0.001 for
    mixtures without it; with weights.quantization 1."""
