"""From a whole configuration to what planning takes of it. Loads nothing heavy, for commands that start nothing."""

from __future__ import annotations

from ctpo_megatron.config import RunConfig
from ctpo_megatron.planning.run import PlannedRun
from ctpo_megatron.planning.topology import ServerSet, Topology, make_topology


def topology_of(config: RunConfig, *, trainer: bool = True, engines: bool = True) -> Topology:
    """Where the processes of `config` are, when it runs with a trainer, with servers, or with both."""
    weights, device = config.weights, config.cluster.device
    engine, teachers = config.rollout.engine, teacher_servers(config)
    return make_topology(config.parallel, engine, weights, device, trainer=trainer, engines=engines, teachers=teachers)


def teacher_servers(config: RunConfig) -> tuple[ServerSet, ...]:
    """The servers of the teachers that the run starts, in their order."""
    distillation = config.algorithm.distillation
    started = [] if distillation is None else distillation.started.values()
    return tuple(ServerSet(each.engine.servers, each.engine.tp, each.engine.nodes) for each in started)


def planned_run(config: RunConfig) -> PlannedRun:
    """What a plan of `ctpo train` on `config` is made from."""
    teaching = config.algorithm.distillation
    copied = 0 if teaching is None else len(teaching.copied)
    return PlannedRun(
        model=config.model,
        data=config.data,
        parallel=config.parallel,
        moe=config.moe,
        optimizer=config.optimizer,
        train=config.train,
        rollout=config.rollout,
        weights=config.weights,
        topology=topology_of(config),
        has_reference=config.algorithm.reference is not None,
        has_teachers=teaching is not None,
        copied_teachers=copied,
        host_copies=copied + _has_own_reference(config),
        keeps_copies=config.checkpoint.memory.every > 0,
        has_critic=config.algorithm.critic is not None,
        top_k=config.algorithm.top_k or config.rollout.top_k or 0,
    )


def _has_own_reference(config: RunConfig) -> bool:
    """Whether a reference policy has weights of its own: with adapters it is the model without them, where no other is named."""
    reference = config.algorithm.reference
    if reference is None or config.model.adapter is None:
        return reference is not None
    return reference.path not in (None, config.model.path)
