"""Everything about a run that follows from its configuration and its model's shape, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ctpo_megatron.models.adapters import check_adapter
from ctpo_megatron.models.rules import check_layout
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.planning.batches import Batches, plan_batches
from ctpo_megatron.planning.groups import Group, rank_groups
from ctpo_megatron.planning.host import HostMemory, host_problem, plan_host
from ctpo_megatron.planning.memory import GIB, Stage, plan_stages
from ctpo_megatron.planning.run import PlannedRun
from ctpo_megatron.planning.servers import FRACTION_FLAG, PlannedTeacher, Servers, plan_servers, plan_teacher


@dataclass(frozen=True, slots=True)
class Hardware:
    """The GPUs of a cluster. Sizes in GiB, as GPUs are sold: an 80 GB GPU has 80 GiB, all but half of one usable."""

    gpu_gib: float = 80.0
    engine_gpu_gib: float | None = None  # of the servers' GPUs; None: the same
    gpus_per_node: int = 8
    host_gib: float | None = None  # memory of a node's host; None: not known


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs and does, and why it cannot run on the hardware if it cannot."""

    stages: list[Stage]
    host: HostMemory  # of one rank
    batches: Batches
    groups: list[Group]
    servers: Servers
    trainer_gpus: int
    server_gpus: int
    teacher_gpus: int
    teachers: dict[str, Servers | None]  # the servers of each that the run starts, by name; None: not planned
    nodes: int
    problems: list[str]  # why it cannot run; empty: it fits

    @property
    def fullest(self) -> int:
        """Bytes on the fullest GPU of the trainer."""
        return max(stage.memory.total for stage in self.stages)

    def ranks_on_node(self, hardware: Hardware) -> int:
        """Ranks of the trainer on one node, at most."""
        return min(self.trainer_gpus, hardware.gpus_per_node)


def make_plan(
    run: PlannedRun,
    shape: ModelShape,
    hardware: Hardware,
    advise: Callable[[], list[str]],
    teachers: Sequence[PlannedTeacher] = (),
) -> Plan:
    """Plan `run` on `hardware`. Raises ConfigError where the layout does not divide the model.

    `advise`: changes of the configuration that would lower the trainer's memory, asked for where that does not fit. `teachers`:
    those whose servers are planned too.
    """
    check_layout(shape, run.parallel, adapted=run.model.adapter is not None)
    if run.model.adapter is not None:
        check_adapter(shape, run.model.adapter, run.moe)
    batches, topology = plan_batches(run), run.topology
    stages = plan_stages(run, shape, batches.packings[0].micro_batches)
    host, ranks_on_node = plan_host(run, stages), min(topology.ranks, hardware.gpus_per_node)
    shared = topology.shares_gpus
    engine_gib = hardware.gpu_gib if shared else hardware.engine_gpu_gib or hardware.gpu_gib
    taken = _taken(run, stages) if shared else 0
    servers = plan_servers(run, shape, None if run.on_cpu else round(engine_gib * GIB), taken)
    teacher_gib = hardware.engine_gpu_gib or hardware.gpu_gib
    taught = {each.name: plan_teacher(run, each, None if run.on_cpu else round(teacher_gib * GIB)) for each in teachers}
    problems = []
    if not run.on_cpu:
        problems += [topology.sharing_problem] if topology.sharing_problem else []
        problems += _trainer_problems(stages, hardware.gpu_gib, advise)
        problems += [lacking] if (lacking := host_problem(run, host, hardware.host_gib, ranks_on_node)) else []
        problems += _server_problems(servers, engine_gib, hardware.gpus_per_node, taken)
        if shared and run.weights.servers_sleep and not servers.missing:
            problems += _room_problems(stages, servers, engine_gib, taken)
        problems += _teacher_problems(teachers, taught, teacher_gib, hardware.gpus_per_node)
        if topology.needs_one_node and topology.ranks > hardware.gpus_per_node:
            problems.append("weights.type=colocated needs all GPUs on one node (--gpus-per-node); use weights.type=broadcast.")
    return Plan(
        stages=stages,
        host=host,
        batches=batches,
        groups=rank_groups(run.parallel),
        servers=servers,
        trainer_gpus=topology.ranks,
        server_gpus=topology.server_gpus,
        teacher_gpus=topology.teacher_gpus,
        teachers=taught,
        nodes=topology.nodes(hardware.gpus_per_node),
        problems=problems,
    )


def _taken(run: PlannedRun, stages: list[Stage]) -> int:
    """Bytes that the trainer keeps, on its fullest GPU, while servers on it generate: all of them unless they take turns."""
    return max(stage.memory.resident if run.weights.servers_sleep else stage.memory.total for stage in stages)


def _trainer_problems(stages: list[Stage], gpu_gib: float, advise: Callable[[], list[str]]) -> list[str]:
    number, stage = max(enumerate(stages), key=lambda item: item[1].memory.total)
    needed = stage.memory.total / GIB
    if needed <= gpu_gib:
        return []
    advice = "; ".join(advise()) or "none of the usual changes helps enough"
    return [
        f"a rank of pipeline stage {number} needs {needed:.1f} GiB, {needed - gpu_gib:.1f} GiB more than --gpu-gb {gpu_gib:g}. "
        f"What one change at a time would do: {advice}."
    ]


def _room_problems(stages: list[Stage], servers: Servers, gpu_gib: float, taken: int) -> list[str]:
    """What comes on a shared GPU after SGLang has taken its share: contexts of other servers' ranks, and saves."""
    left = round(gpu_gib * GIB) - taken - servers.budget
    needed = max(stage.memory.contexts + stage.saving.gpu for stage in stages)
    if needed <= left:
        return []
    return [
        f"SGLang leaves {left / GIB:.1f} GiB of a GPU that it shares with the trainer, but servers that read its weights from "
        f"other GPUs and a save take {needed / GIB:.1f} GiB. What helps: a smaller --mem-fraction-static in "
        "rollout.engine.extra_args, or weights.type=broadcast, with GPUs for the servers."
    ]


def _teacher_problems(
    teachers: Sequence[PlannedTeacher], planned: Mapping[str, Servers | None], gpu_gib: float, gpus_per_node: int
) -> list[str]:
    found = []
    for each in teachers:
        if (servers := planned[each.name]) is not None:
            problems = _server_problems(servers, gpu_gib, gpus_per_node, 0, each.section)
            found += [f"teacher {each.name!r}: {problem}" for problem in problems]
    return found


def _server_problems(
    servers: Servers, gpu_gib: float, gpus_per_node: int, taken: int, section: str = "rollout.engine"
) -> list[str]:
    """Why servers cannot run, where they have `section` of the configuration."""
    found = []
    per_node = servers.gpus_each // servers.nodes_each
    if per_node > gpus_per_node:
        found.append(
            f"{section}.tp={servers.gpus_each} on {section}.nodes={servers.nodes_each}: a server needs {per_node} GPUs "
            f"of a node, and a node has {gpus_per_node} (--gpus-per-node). Let each server spread over "
            f"{-(-servers.gpus_each // gpus_per_node)} nodes."
        )
    if servers.missing:
        needed = (servers.weights + servers.longest * servers.bytes_per_token) / GIB
        larger = f"a larger {section}.tp, " + ("" if per_node < gpus_per_node else f"with {section}.nodes, ")
        where = f"{gpu_gib:g} GiB" + (f" beside {taken / GIB:.1f} GiB of the trainer" if taken else "")
        elsewhere = "weights.type=broadcast, with GPUs for the servers" if taken else "GPUs with more memory (--engine-gpu-gb)"
        found.append(
            f"a server's GPU needs {needed:.1f} GiB for its share of the weights and one sample of {servers.longest:,} tokens, "
            f"{servers.missing / GIB:.1f} GiB more than SGLang has for them on {where}. What helps: {larger}{elsewhere}."
        )
    if servers.communicator_bytes > servers.spare:
        found.append(
            f"each GPU of a server has a communicator with the sender of every pipeline stage: {servers.communicators} take up "
            f"to {servers.communicator_bytes / GIB:.1f} GiB, an estimate, and SGLang leaves {servers.spare / GIB:.1f} GiB free. "
            f"What helps: a smaller parallel.pp, or a smaller {FRACTION_FLAG} in rollout.engine.extra_args."
        )
    return found
