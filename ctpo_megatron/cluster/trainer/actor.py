"""The Ray shell around one rank of the trainer: typed calls in, plain numbers out, no branch on the algorithm."""

from __future__ import annotations

import functools
import gc
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray

from ctpo_megatron.cluster.allocator import keep_memory
from ctpo_megatron.cluster.environment import log_line, node_environment, set_own
from ctpo_megatron.cluster.keepers.calls import Handed, contents_of, hand_over, reader
from ctpo_megatron.cluster.logs import redirect_output
from ctpo_megatron.cluster.ray_cluster import node_address
from ctpo_megatron.cluster.threads import bind_to_cores, check_gpus, cores_of_gpu, set_threads, threads_per_rank
from ctpo_megatron.cluster.trainer.evidence import Signs, gather
from ctpo_megatron.cluster.trainer.tracing import RankTrace, RankTracer, read_clock
from ctpo_megatron.config import RunConfig
from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.errors import ConfigError, CopyLost
from ctpo_megatron.imports import modules_stay
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.models.shape import ModelShape
from ctpo_megatron.models.threads import useful_threads
from ctpo_megatron.ports import free_port
from ctpo_megatron.record.heartbeat import Pulse, Stages, stage
from ctpo_megatron.record.stalls import Evidence
from ctpo_megatron.record.values import Mean, Values, without_vectors

if TYPE_CHECKING:  # imported by `build` or later, after the variables that torch and megatron read are set
    from ctpo_megatron.batch import Abandoned, KeptShard, MicroBatch, Replay
    from ctpo_megatron.mcore.checkpoint.part import Part
    from ctpo_megatron.mcore.kept_tokens import KeptTokens
    from ctpo_megatron.mcore.rank import TrainerRank
    from ctpo_megatron.mcore.reference import Reference
    from ctpo_megatron.weights.protocol import Sent, Server
    from ctpo_megatron.weights.source import RankWeights


WAITS = "train/waits/rank_"  # values that each rank has of its own, by its number

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Built:
    """What `TrainerActor.build` makes."""

    rank: TrainerRank
    weights: RankWeights
    reference: Reference | None
    teachers: dict[int, Reference]  # copied ones, by their places


class TrainerActor:
    """Rank `rank` of the trainer. `build` comes first. Calls run one after another, `watch`, `settle`, `hand_over` and `pulse`
    beside them. `environment`: variables that it sets itself where Ray has not."""

    def __init__(self, config: RunConfig, shape: ModelShape, rank: int, log_path: str, environment: Mapping[str, str]) -> None:
        set_own(config.cluster.device, environment)
        redirect_output(Path(log_path))
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter at INFO
        self.config = config
        self.shape = shape
        self.rank = rank
        self._result: _Built | None = None
        self._part: Part | None = None
        self._kept: KeptTokens | None = None
        self._tracer: RankTracer | None = None
        self._closed = threading.Event()

    @functools.cached_property
    def stages(self) -> Stages:
        """What this rank is doing; the calls below are its stages."""
        return Stages()

    @functools.cached_property
    def _signs(self) -> Signs:
        return Signs()

    @property
    def _built(self) -> _Built:
        """What was built. Raises ConfigError before `build`."""
        if self._result is None:
            raise ConfigError(f"trainer rank {self.rank} was asked to work before it was built")
        return self._result

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it, where the ranks will meet."""
        host = node_address(self.config)
        return host, free_port(host)

    def gpus(self) -> list[str]:
        """The GPUs that Ray gave to this rank, by CUDA's names on this node."""
        return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])

    def _use_host(self, ranks_here: int) -> None:
        """Take this rank's share of the node that it is on, where `ranks_here` ranks are, and say so in the log."""
        device = self.config.cluster.device
        os.environ.update(node_environment(device, node_address(self.config), os.environ))
        if device == "cpu":
            keep_memory()
            set_threads(useful_threads(threads_per_rank(ranks_here), self.shape.hidden_size))
        else:
            check_gpus(self.gpus())
            cores = os.sched_getaffinity(0)
            near = bind_to_cores(cores_of_gpu() & cores)
            set_threads(min(threads_per_rank(ranks_here, len(cores)), len(near) or len(cores)))
        _log.info(log_line("trainer", device, os.environ))

    @stage("build")
    def build(self, master: tuple[str, int], prefix: str, ranks_here: int, total_steps: int) -> RankCoords:
        """Join the process group, build and load the model. Returns where this rank sits.

        `prefix`: of the keys in the store at `master`. `ranks_here`: how many ranks share its node.
        """
        self._use_host(ranks_here)
        with modules_stay():
            from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
            from ctpo_megatron.weights.source import RankWeights

        config = self.config
        rank = TrainerRank(
            config.model.path,
            config.parallel,
            config.optimizer,
            RankInfo(self.rank, config.parallel.world_size, master[0], master[1], prefix=prefix),
            device=config.cluster.device,
            dtype=config.model.dtype,
            seed=config.seed,
            recompute=config.train.recompute,
            total_steps=total_steps,
            moe=config.moe,
            shape=self.shape,
            adapter=config.model.adapter,
            critic=config.algorithm.critic,
            fp8=config.train.fp8,
        )
        reference = config.algorithm.reference
        policy = None if reference is None else rank.reference(reference.path)
        distillation = config.algorithm.distillation
        copied = {} if distillation is None else distillation.copied
        teachers = {place: rank.reference(teacher.path) for place, teacher in copied.items()}
        weights = RankWeights(rank, config.weights, tp=config.rollout.engine.tp, address=node_address(config))
        self._signs.attach(rank.models)
        self._result = _Built(rank, weights, policy, teachers)
        self._free_memory()
        # megatron collects garbage at every copy of the optimizer's state, and would look at all that was imported: 0.3 s
        gc.collect()
        gc.freeze()
        return rank.coords

    @stage("update")
    def update(self, batches: list[list[MicroBatch]], replays: list[list[Replay | None]], version: int) -> Values | Abandoned:
        """Statistics of `loop.protocols.Trainer.update`, or why it was abandoned.

        `replays`: what this rank's routers see of each micro-batch's record.
        """
        from ctpo_megatron.batch import Abandoned, UpdateAbandoned
        from ctpo_megatron.mcore.kept_tokens import KeptTokens
        from ctpo_megatron.mcore.policy import update_policy

        config = self.config
        self._kept = KeptTokens() if config.log.save_rollouts and config.log.save_tokens else None
        with_own = [
            [replace(mb, replay=replay) for mb, replay in zip(micro_batches, own, strict=True)]
            for micro_batches, own in zip(batches, replays, strict=True)
        ]
        found: Values | Abandoned
        rank, begun = self._built.rank, time.perf_counter()
        rank.waited_s()  # of what came before
        try:
            found = update_policy(
                rank,
                with_own,
                algorithm=config.algorithm,
                temperature=config.rollout.temperature,
                drift=config.drift.bounds(
                    config.model.dtype_on(config.cluster.device),
                    mixture=self.shape.num_experts > 0,
                    quantised=config.weights.quantization is not None,
                ),
                version=version,
                reference=self._built.reference,
                teachers=self._built.teachers,
                kept=self._kept,
                density=config.log.counts_ratios(version + 1),
            )
        except UpdateAbandoned as error:  # as a value: every rank has its own part of it
            found = error.update
        self._free_memory()
        if isinstance(found, Abandoned):
            return found
        waits = Mean(rank.waited_s(), time.perf_counter() - begun)
        return (found if self.rank == 0 else without_vectors(found)) | {f"{WAITS}{self.rank}": waits}

    @stage("tokens")
    def tokens(self) -> list[list[KeptShard]]:
        """What this rank kept of the update before, once; nothing where another rank has the same."""
        kept, self._kept = self._kept, None
        return [] if kept is None or self._built.rank.coords.tp_rank else kept.take()

    @stage("update")
    def supervise(self, batch: list[MicroBatch]) -> Values | Abandoned:
        """Statistics of `loop.protocols.Trainer.supervise`, or why it was abandoned."""
        from ctpo_megatron.batch import UpdateAbandoned
        from ctpo_megatron.mcore.policy import supervise

        try:
            return supervise(self._built.rank, batch)
        except UpdateAbandoned as error:
            return error.update

    @stage("assess")
    def assess(self, batch: list[MicroBatch]) -> Values:
        """Statistics of `loop.protocols.Trainer.assess`."""
        from ctpo_megatron.mcore.policy import assess

        return assess(self._built.rank, batch)

    @stage("canary")
    def canary_logp(self, token_ids: list[int], experts: Experts | None) -> list[float]:
        """Log-probs of this rank's part of the padded prompt: `RankWeights.canary_logp`."""
        return self._built.weights.canary_logp(token_ids, experts)

    @stage("connect")
    def connect(self, servers: list[Server], api_key: str) -> None:
        """Let the sending ranks reach the servers: `RankWeights.connect`."""
        self._built.weights.connect(servers, api_key)

    @stage("prepare")
    def prepare(self, version: int) -> None:
        """Gather the first bucket in step with the other ranks: `RankWeights.prepare`."""
        self._built.weights.prepare(version)

    @stage("publish")
    def publish(self, version: int) -> Sent:
        """What this rank sent, in step with the other ranks: `RankWeights.publish`."""
        sent = self._built.weights.publish(version)
        self._free_memory()
        return sent

    def _free_memory(self) -> None:
        """Give memory that torch keeps for later back to the GPU, for servers on it that are about to start or wake."""
        if self.config.weights.servers_sleep:
            import torch

            if torch.cuda.is_initialized():
                torch.cuda.ipc_collect()  # buckets that servers have read: torch holds them until it has looked
            torch.cuda.empty_cache()

    @stage("save")
    def save(self, directory: str, background: bool) -> None:
        """Save this rank's part of a checkpoint: `loop.protocols.Trainer.save`."""
        self._built.rank.save(Path(directory), background=background)

    @stage("dump")
    def save_weights(self, directory: str) -> None:
        """Save this rank's part of the weights: `loop.protocols.Trainer.save_weights`."""
        self._built.rank.save_weights(Path(directory))

    @stage("write checkpoint")
    def settle(self, timeout_s: float) -> None:
        """Wait for the save in flight: `loop.protocols.Trainer.settle`."""
        self._built.rank.settle(timeout_s)

    @stage("load")
    def load(self, directory: str) -> None:
        """Go on from this rank's part of a checkpoint: `loop.protocols.Trainer.load`."""
        self._built.rank.load(Path(directory))

    @stage("copy")
    def copy(self) -> str:
        """Copy this rank's part of the state to host memory, for `hand_over`. Returns the node that it is on."""
        self._part = self._built.rank.part()
        return ray.get_runtime_context().get_node_id()

    def hand_over(self, step: int, keeper: Any, stays: int | None) -> Handed:
        """Send what was copied to `keeper`, beside the other calls: `keepers.calls.hand_over`. It bounds its waits itself."""
        part, self._part = self._part, None
        if part is None:
            raise CopyLost(f"trainer rank {self.rank} has copied nothing")
        return hand_over(part, keeper, step, self.rank, stays)

    @stage("recall")
    def recall(self, step: int, keepers: list[Any], digest: str) -> None:
        """Go on from what `keepers` hold, one for each rank: `TrainerRank.recall`. `digest`: of this rank's part."""
        contents = functools.partial(contents_of, keepers[self.rank], step, self.rank, digest)
        self._built.rank.recall(contents, reader(keepers, step, self.stages.beat))

    @stage("export")
    def save_hf(self, directory: str) -> None:
        """Write this rank's part of a Hugging Face model directory: `loop.protocols.Trainer.save_hf`."""
        rank, target = self._built.rank, Path(directory)
        rank.save_hf(target)
        if rank.adapter is not None:
            rank.save_adapter(target.with_name("adapter"))

    def clock(self) -> tuple[int, str]:
        """This rank's clock: `tracing.read_clock`. In a thread of its own."""
        return read_clock()

    def begin_trace(self, profile: str | None, memory: str | None) -> None:
        """Trace what this rank does until `end_trace`. `profile`, `memory`: files that are asked for besides."""
        self.end_trace()  # of a step that did not come to its end
        paths = [None if each is None else Path(each) for each in (profile, memory)]
        self._tracer = RankTracer(self._built.rank, self.stages, *paths)

    def end_trace(self) -> RankTrace:
        """End the trace; returns what was gathered."""
        tracer, self._tracer = self._tracer, None
        return RankTrace() if tracer is None else tracer.end()

    def pulse(self) -> Pulse:
        """What this rank is doing now. Asked every two seconds, in a thread of its own."""
        if self._signs.moved():
            self.stages.beat()
        memory = psutil.Process().memory_info().rss
        return Pulse(os.getpid(), ray.get_runtime_context().get_node_id(), self.stages.now(), memory=memory)

    def evidence(self) -> Evidence:
        """Where this rank is, and its last collective calls: asked when one is late."""
        doing = self.stages.now()
        return gather(doing[0].thread if doing else threading.main_thread().ident or 0)

    def watch(self) -> None:
        """Return when the actor is closed; the caller learns at once when the process dies."""
        self._closed.wait()

    def close(self) -> None:
        """Leave all groups. Safe before `build`."""
        if self._result is not None:
            self._result.weights.close()
            self._result.rank.close()
        self._closed.set()
