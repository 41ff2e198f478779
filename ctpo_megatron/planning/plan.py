"""Everything about a run that follows from its configuration and its model's shape, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from ctpo_megatron.config import RunConfig
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.batches import Batches, plan_batches
from ctpo_megatron.planning.groups import Group, rank_groups
from ctpo_megatron.planning.knobs import helpful_changes
from ctpo_megatron.planning.memory import GIB, Stage, plan_stages
from ctpo_megatron.planning.servers import Servers, plan_servers


@dataclass(frozen=True, slots=True)
class Hardware:
    """The GPUs that are to be had. Sizes in GiB, as GPUs are sold: an 80 GB GPU has 80 GiB, all but half of one usable."""

    gpu_gib: float = 80.0
    engine_gpu_gib: float | None = None  # of the servers' GPUs; None: the same
    gpus_per_node: int = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole of it."""

    stages: list[Stage]
    batches: Batches
    groups: list[Group]
    servers: Servers
    trainer_gpus: int
    server_gpus: int
    nodes: int
    problems: list[str]  # why it cannot run; empty: it fits

    @property
    def fullest(self) -> int:
        """Bytes on the fullest GPU of the trainer."""
        return max(stage.memory.total for stage in self.stages)


def make_plan(config: RunConfig, shape: ModelShape, hardware: Hardware) -> Plan:
    """Plan `config` on `hardware`. Raises ConfigError where the layout does not divide the model."""
    check_layout(shape, config.parallel)
    batches = plan_batches(config)
    stages = plan_stages(config, shape, batches.packings[0].micro_batches)
    on_cpu = config.cluster.device == "cpu"
    engine_gib = hardware.engine_gpu_gib or hardware.gpu_gib
    shared = config.weights.type == "colocated" and not on_cpu
    engine_gib = hardware.gpu_gib if shared else engine_gib
    taken = _taken(config, stages) if shared else 0
    servers = plan_servers(config, shape, None if on_cpu else round(engine_gib * GIB), taken)
    server_gpus = 0 if shared else servers.servers * servers.gpus_each
    problems = []
    if not on_cpu:
        problems += [config.sharing_problem] if config.sharing_problem else []
        problems += _trainer_problems(config, shape, stages, hardware.gpu_gib)
        problems += _server_problems(servers, engine_gib, hardware.gpus_per_node, taken)
        if shared and config.parallel.world_size > hardware.gpus_per_node:
            problems.append("weights.type=colocated needs all GPUs on one node (--gpus-per-node); use weights.type=broadcast.")
    return Plan(
        stages=stages,
        batches=batches,
        groups=rank_groups(config.parallel),
        servers=servers,
        trainer_gpus=config.parallel.world_size,
        server_gpus=server_gpus,
        nodes=-(-(config.parallel.world_size + server_gpus) // hardware.gpus_per_node),
        problems=problems,
    )


def _taken(config: RunConfig, stages: list[Stage]) -> int:
    """Bytes that the trainer keeps, on its fullest GPU, while servers on it generate: all of them unless they take turns."""
    return max(stage.memory.resident if config.servers_sleep else stage.memory.total for stage in stages)


def _trainer_problems(config: RunConfig, shape: ModelShape, stages: list[Stage], gpu_gib: float) -> list[str]:
    number, stage = max(enumerate(stages), key=lambda item: item[1].memory.total)
    needed = stage.memory.total / GIB
    if needed <= gpu_gib:
        return []
    advice = "; ".join(helpful_changes(config, shape, gpu_gib)) or "none of the usual changes helps enough"
    return [
        f"a rank of pipeline stage {number} needs {needed:.1f} GiB, {needed - gpu_gib:.1f} GiB more than --gpu-gb {gpu_gib:g}. "
        f"What one change at a time would do: {advice}."
    ]


def _server_problems(servers: Servers, gpu_gib: float, gpus_per_node: int, taken: int) -> list[str]:
    found = []
    per_node = servers.gpus_each // servers.nodes_each
    if per_node > gpus_per_node:
        found.append(
            f"rollout.engine.tp={servers.gpus_each} on rollout.engine.nodes={servers.nodes_each}: a server needs {per_node} GPUs "
            f"of a node, and a node has {gpus_per_node} (--gpus-per-node). Let each server spread over "
            f"{-(-servers.gpus_each // gpus_per_node)} nodes."
        )
    if servers.missing:
        needed = (servers.weights + servers.longest * servers.bytes_per_token) / GIB
        larger = "a larger rollout.engine.tp, " + ("" if per_node < gpus_per_node else "with rollout.engine.nodes, ")
        where = f"{gpu_gib:g} GiB" + (f" beside {taken / GIB:.1f} GiB of the trainer" if taken else "")
        elsewhere = "weights.type=broadcast, with GPUs for the servers" if taken else "GPUs with more memory (--engine-gpu-gb)"
        found.append(
            f"a server's GPU needs {needed:.1f} GiB for its share of the weights and one sample of {servers.longest:,} tokens, "
            f"{servers.missing / GIB:.1f} GiB more than SGLang has for them on {where}. What helps: {larger}{elsewhere}."
        )
    return found
