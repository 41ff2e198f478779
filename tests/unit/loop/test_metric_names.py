"""Every name that the parts of a run make is in the catalogue, and every name of the catalogue is made by one of them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.algorithms import LocalScan, Stats, policy_loss
from ctpo_megatron.algorithms.distillation import distillation_loss
from ctpo_megatron.algorithms.health import POSITION_BINS
from ctpo_megatron.algorithms.reference import reference_penalty
from ctpo_megatron.cluster.resources import Resources
from ctpo_megatron.cluster.trainer.actor import WAITS
from ctpo_megatron.config.advantages import GaeAdvantage
from ctpo_megatron.config.critic import CriticConfig
from ctpo_megatron.config.evaluation import benchmarks_of
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.traffic import TrafficConfig
from ctpo_megatron.data.demonstrations import Demonstrations
from ctpo_megatron.data.order import PromptSampler
from ctpo_megatron.data.packing import pack
from ctpo_megatron.engine.busy import BusyTimes
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.engine.load import Load, LoadsSeen
from ctpo_megatron.engine.teachers import AskedTeachers
from ctpo_megatron.loop.admission import Admission
from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.loop.composition import StepRules
from ctpo_megatron.loop.evaluation.evaluate import Benchmark, Evaluator
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.pipeline import Pipeline
from ctpo_megatron.loop.report import StepCost
from ctpo_megatron.loop.sft import SftLoop
from ctpo_megatron.loop.skipping import SKIPPED
from ctpo_megatron.loop.statistics import expert_load, rollout_metrics, train_metrics
from ctpo_megatron.mcore.critic import critic_share, estimated, explained
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.record.catalogue import CATALOGUE, find, require_known
from ctpo_megatron.record.events import discard
from ctpo_megatron.record.recorder import SAMPLES
from ctpo_megatron.record.values import Max, Mean, Sum, Values, without_vectors
from ctpo_megatron.types import AttemptId, GroupId, Prompt, Status, TrainSample, Trajectory, TrajectoryGroup, Turn
from ctpo_megatron.weights.publisher import Proof, WeightPublisher
from tests.support.fake_servers import FakeTrainer, fakes
from tests.support.numbers import on_host
from tests.support.oracles import OBJECTIVES
from tests.support.runs import ROOT

MODEL = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MODEL |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 75, "max_position_embeddings": 128, "hidden_act": "silu"}


def loss_stats(**options: Any) -> Values:
    """Statistics of a loss on a few tokens."""
    tokens = 2 * torch.rand(12, dtype=torch.float64) - 1
    fixed = {"mask": torch.ones(12, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 4, 12])}
    given = {"logp": (tokens - 1).requires_grad_(), "old_logp": torch.full_like(tokens, -1), "advantages": tokens}
    return handed_on(
        policy_loss(options.pop("objective"), **given, **fixed, rollout_logp=given["old_logp"] + 0.1, **options).stats
    )


def reference_stats() -> Values:
    logp = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    fixed = {"mask": torch.ones(4, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 4]), "weights": torch.ones(1)}
    return handed_on(reference_penalty("k3", logp=logp, reference_logp=logp.detach() - 1, **fixed).stats)


def teacher_stats() -> Values:
    logp = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    fixed = {"mask": torch.ones(4, dtype=torch.bool), "cu_seqlens": torch.tensor([0, 4]), "weights": torch.ones(1)}
    return handed_on(distillation_loss(logp=logp, sampled_logp=logp, teacher_logp=logp - 1, **fixed).stats)


def critic_stats() -> Values:
    """Those of a value head's estimates and of its loss, and what its optimizer step adds."""
    sample = TrainSample([1, 2], [2, 3], [False, True], [0.0, -0.5], [-1, 0], [0.0, 0.0], rewards=[0.0, 1.0])
    ((mb,),) = pack([sample], dp=1, max_tokens=64)
    (estimate,), (before,) = estimated([mb], [mb], [torch.zeros(2)], LocalScan(), GaeAdvantage())
    _, of_loss = critic_share(estimate.with_streams(values=torch.ones(2)), LocalScan(), CriticConfig())
    return explained(on_host(before | of_loss)) | {f"critic/{name}": Mean(1.0) for name in ("grad_norm", "lr")}


def handed_on(stats: Stats) -> Values:
    """As the trainer hands statistics to the driver, without what it looks at itself."""
    return {name: value for name, value in on_host(stats).items() if name != "nonfinite"}


def trained() -> set[str]:
    """What comes of an update, with everything that a run can ask for."""
    measured = {"type": "ctpo", "band": "entropy"}
    found = loss_stats(objective=measured, correction={"type": "truncate", "level": "token"}, delight={})
    found |= reference_stats() | teacher_stats() | critic_stats()
    means = (
        "loss",
        "grad_norm",
        "lr",
        "entropy",
        "support_mass",
        "teacher/kl/big",
        "moe/load_entropy/layer_1",
        "moe/load_max_over_mean/layer_1",
        "routing/changed",
    )
    found |= {name: Mean(1.0) for name in (*means, "drift/mean")}
    by_position = np.ones(POSITION_BINS)
    found[SKIPPED] = Sum(0.0)  # by Skipping.update
    found |= {"drift/from_token": Mean(by_position, by_position), "drift/max": Max(1.0), "grad_norm_max": Max(1.0)}
    return set(train_metrics(found))


def group(number: int = 0) -> TrajectoryGroup:
    turns = [Turn("assistant", [1, 2], [-1.0, -1.0], [0, 0])]
    name = GroupId(number)
    experts = np.zeros((2, 1, 1), np.int8)
    made = [
        Trajectory(0, [3], turns, Status.FINISHED, routed_experts=experts, terms={"answer": 1.0}, id=AttemptId(name, n))
        for n in range(2)
    ]
    return TrajectoryGroup(Prompt(0, ({"role": "user", "content": "q"},), "1"), made, id=name)


def evaluated() -> set[str]:
    class Sampled:
        async def group(self, prompt: Prompt, name: GroupId, **_: Any) -> TrajectoryGroup:
            return group()

    config = load_config(ROOT / "configs" / "quickstart.yaml", ["eval.samples=2"])
    (settings,) = benchmarks_of(config.data, config.eval, config.rollout)
    evaluator = Evaluator(Sampled(), None, seed=1)  # no answer, so nothing to compare
    return set(asyncio.run(evaluator.evaluate([Benchmark(settings, [group().prompt])], step=0)).metrics())


def supervised() -> set[str]:
    names: set[str] = set()

    class Ranks:
        async def supervise(self, batch: Any) -> Values:
            return {"nll": Mean(1.0, 2.0), "tokens": Sum(2.0), "grad_norm": Mean(1.0)}

        assess = supervise

    class Notes:
        def step(self, step: int, metrics: dict[str, float]) -> None:
            names.update(metrics)

    sample = TrainSample([1, 2], [2, 3], [True, True], [0.0, 0.0], [-1, -1], [0.0, 0.0])
    config = load_config(ROOT / "configs" / "quickstart_sft.yaml", ["sft.steps=1", "sft.eval=held_out.jsonl"])
    demonstrations = Demonstrations({"": [sample]}, config.data, 1)
    asyncio.run(SftLoop(config, demonstrations, Ranks(), Notes(), held_out=[sample]).run())
    return names


def published() -> set[str]:
    """By servers that have given back their memory, at the second publication: all phases there are."""

    async def scenario() -> set[str]:
        shape = parse_config(MODEL)
        proof = Proof(EngineLayout(shape, 1), shape.vocab_size, 1e-3)
        async with fakes(1, traffic=TrafficConfig(per_server=4, look_s=60.0)) as (servers, fleet, client, _):
            trainer = FakeTrainer(servers, list(proof.layout.tensors))
            publisher = WeightPublisher(fleet, client.control, trainer, proof, api_key="key", timeout_s=5.0, release=True)
            names = set(await publisher.publish(1))
            await client.traffic.look()
            await publisher.offload()
            return names | set(await publisher.publish(2))

    return asyncio.run(asyncio.wait_for(scenario(), 50))


def timed() -> set[str]:
    return set(StepCost.of([group()], dict.fromkeys(("rollout", "batch", "sleep", "train", "publish"), 1.0), 5.0).metrics())


def accounted() -> set[str]:
    class Sampled:
        async def group(self, prompt: Prompt, name: GroupId, **_: Any) -> TrajectoryGroup:
            return group(name.number)

    async def scenario() -> set[str]:
        config = load_config(ROOT / "configs" / "quickstart.yaml", [])
        buffer = GroupBuffer(StepRules(2, 0), first_step=0, last_step=1)
        admission, teachers = Admission(PromptSampler([group().prompt], 1)), AskedTeachers({}, lambda _source: None)
        pipeline = Pipeline(admission, buffer, Ledger(), Sampled(), config.rollout, discard, teachers)
        taken, _ = await asyncio.gather(pipeline.take(0), pipeline.feed())
        return set(taken.metrics)

    return asyncio.run(asyncio.wait_for(scenario(), 10))


def used(run_dir: Path) -> set[str]:
    """By the processes of a run, when an hour of it is over."""
    times = iter(range(0, 10**6, 60))
    resources = Resources(run_dir, clock=lambda: next(times))
    memory = {"inference server 0": 2**30, "trainer rank 0": 2**31}
    found = [resources.metrics(memory) for _ in range(10)]
    assert all(0 < each["host/memory_used"] < 1 for each in found)
    return {name for each in found for name in each}


def one_by_one() -> set[str]:
    seen = LoadsSeen()
    seen.saw("inference server 0", Load(1, 1, 0, 0.5))
    return set(seen.metrics()) | asyncio.run(worked())


async def worked() -> set[str]:
    """By a server that has something to do while a step goes on."""
    busy = BusyTimes()
    busy.begin()
    busy.asked("inference server 0")
    await asyncio.sleep(0.01)
    return set(busy.metrics())


def test_a_step_without_a_token_of_the_newest_version_has_no_drift() -> None:
    gap = {"drift/max": Max(0.0), "drift/mean": Mean(0.0, 0.0)}
    assert train_metrics(gap) == {}
    assert train_metrics({**gap, "drift/mean": Mean(0.0, 3.0)}) == {"drift/mean": 0.0, "drift/max": 0.0}


def test_what_is_made_is_what_is_listed(tmp_path: Path) -> None:
    made = trained() | set(rollout_metrics([group()], 0)) | evaluated() | supervised() | published() | timed()
    made |= accounted() | used(tmp_path) | one_by_one()
    made |= {"teacher/seconds"}  # by AskedTeachers, of an answer
    made |= {"time/checkpoint", "time/rollout_tail", "train/spared", SAMPLES, f"{WAITS}0"}  # by record, loop, actor
    require_known(made)
    assert {metric.name for metric in CATALOGUE} - {find(name).name for name in made} == set()


@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES)))
def test_every_objective_reports_known_names(objective: str) -> None:
    require_known(train_metrics(loss_stats(objective={"type": objective})))


def test_the_readers_of_a_run_know_the_names() -> None:
    """Tools that read metrics.jsonl name metrics as the catalogue does."""
    for tool in ("quickstart.py", "ablate.py", "example_results.py"):
        text = (Path(ROOT) / "tools" / tool).read_text()
        groups = "|".join(sorted({metric.group for metric in CATALOGUE}))
        named = re.findall(rf'"((?:{groups})/[a-z_]+)"', text)
        assert named, tool
        require_known(named)


def test_the_load_of_experts_is_a_table_of_layers_in_their_order() -> None:
    rows = {layer: np.arange(3.0) + layer for layer in (10, 2)}
    stats = {f"moe/load/layer_{layer}": Mean(2 * row, 2.0) for layer, row in rows.items()} | {"loss": Mean(1.0)}
    assert expert_load(stats).tolist() == [rows[2].tolist(), rows[10].tolist()]
    assert expert_load({"loss": Mean(1.0)}) is None
    assert set(without_vectors(stats)) == {"loss"}
    require_known(train_metrics(stats))
