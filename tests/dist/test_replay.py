"""A step that is not finite is not applied, is dumped once, and replays at other layouts find the same place. Real megatron-core.

One set of processes makes all the faults, each at a layout of its own; one replays all dumps at one rank, one at another layout.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ctpo_megatron.batch import Abandoned, TrainBatch, UpdateAbandoned
from ctpo_megatron.checkpoints.files import begin_checkpoint
from ctpo_megatron.cluster.trainer.abandoned import join_abandoned
from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.data.dumps import sequences_of
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.jobs.replay import ReplayReport, prepare_replay, replay_job
from ctpo_megatron.loop.dumps import StepDumps, Written, all_dumps
from ctpo_megatron.mcore.gathering import gather_weights
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.mcore.replay.rank import Replayed, replay_on_rank
from ctpo_megatron.models.coords import RankCoords
from ctpo_megatron.record.values import scalar
from tests.support.families import MODELS
from tests.support.parity import draw_samples
from tests.support.ranks import at_own_port, free_port, run_ranks
from tests.support.runs import ROOT
from tests.support.tiny import write_model

pytestmark = pytest.mark.dist

LAYERS = 4
BAD = 8  # the sequence that faults are planted in, of 12; the second optimizer step's
OPTIMIZER = OptimizerConfig(lr=2e-3, eps=0.1, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """A fault, the layout that it happens at, and the other layout that it is replayed at."""

    fault: str
    family: str
    parallel: dict[str, int]
    other: dict[str, int]
    verdict: str
    at: int | None  # the optimizer step that is not applied


CASES = {
    "weight tp2": Case("weight", "qwen3", {"tp": 2}, {"cp": 2}, "forward", 0),
    "weight pp2": Case("weight", "qwen3", {"pp": 2}, {"tp": 2}, "forward", 0),
    "expert dp2": Case("expert", "deepseek_v3", {"dp": 2, "ep": 2}, {"tp": 2}, "forward", 0),
    "advantage cp2": Case("advantage", "qwen3", {"cp": 2}, {"pp": 2}, "batch", 1),
    "log-ratio dp2": Case("log-ratio", "deepseek_v3", {"dp": 2}, {"cp": 2, "ep": 2}, "batch", 1),
    "too large pp2": Case("too large", "qwen3", {"pp": 2}, {"dp": 2}, "norm", 1),
    "none tp2": Case("none", "qwen3", {"tp": 2}, {"pp": 2}, "finite", None),
}
NAMES = {  # of what is planted: the module that shows it, the weights
    "weight": ("decoder.layers.2.mlp.linear_fc1", "model.layers.2.mlp.gate_proj.weight"),
    "expert": ("decoder.layers.2.mlp.experts.local_experts.3.linear_fc2", "model.layers.2.mlp.experts.3.down_proj.weight"),
}


class Outcome(NamedTuple):
    """What one rank gave."""

    coords: RankCoords
    update: Abandoned | None
    changed: list[str]  # parts of its state that the abandoned optimizer step left otherwise than they were before it
    expected: tuple[float, float]  # loss and gradient norm where nothing is planted


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Outcome]]]:
    root = tmp_path_factory.mktemp("replay")
    models = {family: write_model(root / family, family, LAYERS, MODELS[family]) for family in ("qwen3", "deepseek_v3")}
    ports = {name: free_port() for name in CASES}
    ranks = run_ranks(2, make_faults, models, root, ports)
    outcomes = {name: [Outcome(*rank[name]) for rank in ranks] for name in CASES}
    return {name: (dumped(name, root, found), found) for name, found in outcomes.items()}


@pytest.fixture(scope="module")
def reports(dumps: dict[str, tuple[Path, list[Outcome]]]) -> dict[str, list[ReplayReport]]:
    """Of each case: at one rank, and at the other layout."""
    alone = {name: prepare_replay(path, []) for name, (path, _) in dumps.items()}
    other = {name: prepare_replay(path, overrides(CASES[name].other)) for name, (path, _) in dumps.items()}
    ports = {name: free_port() for name in CASES}
    (one,) = run_ranks(1, replays, {name: each.what for name, each in alone.items()}, ports)
    two = run_ranks(2, replays, {name: each.what for name, each in other.items()}, ports)
    return {name: [alone[name].report([one[name]]), other[name].report([part[name] for part in two])] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_not_applied_on_any_rank(dumps: dict[str, tuple[Path, list[Outcome]]], name: str) -> None:
    """Weights, moments, schedule, balancing biases and random states are those before it, bit for bit."""
    case, (_, outcomes) = CASES[name], dumps[name]
    for outcome in outcomes:
        assert outcome.changed == [], name
        assert (outcome.update is None) == (case.fault == "none")
        if outcome.update is not None:
            assert outcome.update.at == case.at
            assert outcome.update.reason == outcomes[0].update.reason
            assert ("loss" in outcome.update.values) == (case.at == 1), "the first optimizer step's statistics stay"


@pytest.mark.parametrize("name", CASES)
def test_replays_at_two_layouts_name_the_same_place(reports: dict[str, list[ReplayReport]], name: str) -> None:
    case = CASES[name]
    for report in reports[name]:
        assert report.verdict == case.verdict, (report.parallel, report.merged)
        assert report.merged.finite == (case.verdict == "finite")
    alone, other = (report.merged for report in reports[name])
    if case.fault in NAMES:
        module, tensor = NAMES[case.fault]
        assert alone.forward.module == other.forward.module == module
        assert alone.forward.place == other.forward.place
        assert list(alone.weights) == list(other.weights) == [tensor]
    else:
        assert not alone.weights
        assert not other.weights
        assert alone.forward is None
        assert other.forward is None
    assert alone.bad_tokens == other.bad_tokens
    assert [each.place for each in alone.tokens] == [each.place for each in other.tokens]
    for row, same in zip(alone.layers, other.layers, strict=True):
        assert row.output == pytest.approx(same.output, rel=1e-4), (name, row.layer)


def test_guilty_tokens_are_named_with_their_terms(reports: dict[str, list[ReplayReport]]) -> None:
    for report in reports["advantage cp2"]:
        (fault,) = report.batch_faults
        assert (fault.stream, fault.sequence) == ("advantages", BAD)
        assert {each.place.sequence for each in report.merged.tokens} == {BAD}
        assert all(each.first_bad == "advantage" for each in report.merged.tokens)
        assert fault.count == report.merged.bad_tokens > 1
        assert report.merged.tokens[0].place.position == fault.position
        assert list(report.merged.gradients), "a loss that is not a number has no other gradients"
    for report in reports["log-ratio dp2"]:
        fault, anchor = report.batch_faults  # the anchor is the rollout's log-prob here
        assert (anchor.stream, anchor.position, anchor.value) == ("anchor_logp", fault.position, -math.inf)
        assert (fault.stream, fault.sequence, fault.value, fault.count) == ("rollout_logp", BAD, -math.inf, 1)
        (token,) = report.merged.tokens
        assert (token.place.sequence, token.place.position, token.first_bad) == (BAD, fault.position, "rollout_logp")
    for report in reports["too large pp2"]:
        assert report.merged.largest_gradients[0][1] > 1e18
        assert math.isinf(report.merged.grad_norm)


def test_a_finite_step_has_its_loss_and_norm_at_every_layout(
    dumps: dict[str, tuple[Path, list[Outcome]]], reports: dict[str, list[ReplayReport]]
) -> None:
    loss, norm = dumps["none tp2"][1][0].expected
    for report in reports["none tp2"]:
        assert report.merged.loss == pytest.approx(loss, abs=1e-6)
        assert report.merged.grad_norm == pytest.approx(norm, rel=1e-5)
        assert not report.merged.bad_tokens


def test_the_command_by_itself(dumps: dict[str, tuple[Path, list[Outcome]]], capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of its own, as a page and as JSON."""
    path = dumps["weight pp2"][0]
    replay_job(path, ["parallel.tp=2"], as_json=False)
    shown = capsys.readouterr().out
    assert f"FIRST NON-FINITE VALUE, forward: {NAMES['weight'][0]}, rank " in shown
    assert NAMES["weight"][1] in shown
    assert "then (pp=2): the log-prob of a token" in shown
    replay_job(path, [], as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["forward"]["module"] == NAMES["weight"][0]
    assert content["verdict"] == "forward"


def dumped(name: str, root: Path, outcomes: list[Outcome]) -> Path:
    """The dump that the driver writes of what the ranks gave; where nothing is planted, one of the second batch."""
    case = CASES[name]
    batches = batches_of(case)
    update = Abandoned("nothing", None, BAD, {}, [])
    if outcomes[0].update is not None:
        update = join_abandoned([each.update for each in outcomes], [each.coords for each in outcomes], batches)
    directory = root / "runs" / name / "dumps"
    directory.parent.mkdir(parents=True)  # a run has its directory
    writer = StepDumps(Saved(root / "weights" / name), directory, config_of(case))
    written: Written = asyncio.run(writer.write(update, batches, step=1))
    number = 1 if case.fault in NAMES else 2  # weights show at the first sequence
    assert sorted(path.name for path in directory.iterdir()) == [f"step_00000001.{number}"]
    assert all_dumps(directory) == [written.path]
    assert written.bytes > 10_000
    return written.path


class Saved:
    """Stands for the trainer when it saves: its ranks did, and are gone."""

    def __init__(self, saved: Path) -> None:
        self._saved = saved

    async def save_weights(self, directory: Path) -> None:
        self._saved.rename(directory)


def overrides(layout: dict[str, int]) -> list[str]:
    return [f"parallel.{name}={size}" for name, size in layout.items()]


def config_of(case: Case) -> RunConfig:
    options = ["algorithm.anchor=rollout", "train.max_tokens_per_micro_batch=2048", "moe.bias_update_rate=0.125"]
    return load_config(ROOT / "configs" / "quickstart.yaml", [*options, *overrides(case.parallel)])


def batches_of(case: Case) -> list[TrainBatch]:
    """Two optimizer steps of 6 sequences in packs of at most 64 tokens per rank; a fault of the batch is in the second."""
    samples = [replace(sample, routed_experts=None) for sample in draw_samples()]
    bad = samples[BAD]
    if case.fault == "advantage":
        samples[BAD] = replace(bad, advantages=[math.nan if mine else 0.0 for mine in bad.mask])
    if case.fault == "too large":
        samples[BAD] = replace(bad, advantages=[3e37 if mine else 0.0 for mine in bad.mask])
    if case.fault == "log-ratio":
        places = [place for place, mine in enumerate(bad.mask) if mine]
        values = [-math.inf if place == places[1] else value for place, value in enumerate(bad.rollout_logp)]
        samples[BAD] = replace(bad, rollout_logp=values)
    algorithm, parallel = config_of(case).algorithm, ParallelConfig(**case.parallel)
    made = []
    for first in (0, 6):
        options = {"aggregation": algorithm.aggregation, "parallel": parallel, "max_tokens": 64, "first_id": first}
        made.append(build_train_batch(samples[first : first + 6], **options))
    return made


# ---- what runs in the ranks


def make_faults(rank: RankInfo, models: dict[str, Path], root: Path, ports: dict[str, int]) -> dict[str, tuple]:
    """The fields of an `Outcome` by case: what is defined here has no name in the process that asks."""
    from ctpo_megatron.mcore.collective import on_first_rank
    from ctpo_megatron.mcore.policy import update_policy

    found = {}
    for name, case in CASES.items():
        config = config_of(case)
        options = {"device": "cpu", "seed": 1, "moe": MoeConfig(bias_update_rate=0.125)}
        place = replace(rank, master_port=ports[name])
        engine = TrainerRank(str(models[case.family]), config.parallel, OPTIMIZER, place, **options)
        plant(engine, case)
        batches = [batch.micro_batches[engine.coords.dp_rank] for batch in batches_of(case)]
        settings = {"algorithm": config.algorithm, "temperature": 1.0, "drift": DriftBounds(), "version": 0}
        target = root / "weights" / name
        on_first_rank(lambda target=target: begin_checkpoint(target, {}), "no checkpoint")
        if case.fault == "none":
            engine.save_weights(target)
            values = update_policy(engine, [batches[1]], **settings)
            found[name] = (engine.coords, None, [], (scalar(values["loss"]), scalar(values["grad_norm"])))
        else:
            with watched(engine) as before, pytest.raises(UpdateAbandoned) as caught:
                update_policy(engine, batches, **settings)
            found[name] = (engine.coords, caught.value.update, differing(before, state(engine)), (0.0, 0.0))
            engine.save_weights(target)
        engine.close()
    return found


def plant(engine: TrainerRank, case: Case) -> None:
    """An infinity in one weight of a layer, on the one rank that holds it."""
    from ctpo_megatron.mcore.hf.load import keyed_tensors

    keys = {
        "weight": "decoder.layers.2.mlp.linear_fc1.weight",
        "expert": "decoder.layers.2.mlp.experts.local_experts.3.linear_fc2.weight",
    }
    for model in engine.models:
        for key, tensor in keyed_tensors(model, engine.shape, engine.coords):
            whole = engine.coords.tp_rank == 0 or case.fault == "expert"
            if key == keys.get(case.fault) and whole:
                tensor.data[1, 2] = math.inf
                engine.optimizer.reload_model_params()


@contextmanager
def watched(engine: TrainerRank) -> Iterator[dict[str, Any]]:
    """Yields the state before the last optimizer step that begins inside."""
    before: dict[str, Any] = state(engine)
    original = engine.train_step

    def step(*args: Any, **options: Any) -> Any:
        before.clear()
        gather_weights(engine.models)  # the step before leaves that to the next one's forward pass
        before.update(state(engine))
        return original(*args, **options)

    engine.train_step = step
    yield before


def state(engine: TrainerRank) -> dict[str, Any]:
    from ctpo_megatron.mcore.checkpoint import random_state
    from ctpo_megatron.mcore.host import megatron_region

    with megatron_region(engine.device):
        found: dict[str, Any] = {"random": random_state.capture(), "schedule": engine.schedule.state_dict()}
    for number, model in enumerate(engine.models):
        found |= {f"{number} {name}": tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for number, part in enumerate(engine.optimizer.chained_optimizers):
        if part.optimizer is None:
            continue
        for index, moments in enumerate(part.optimizer.state.values()):
            found |= {f"optimizer {number} {index} {name}": value.clone() for name, value in moments.items()}
        for index, group in enumerate(part.optimizer.param_groups):
            found[f"group {number} {index}"] = {name: value for name, value in group.items() if name != "params"}
            masters = {f"master {number} {index} {i}": tensor.detach().clone() for i, tensor in enumerate(group["params"])}
            found |= masters
    return found


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, value in before.items() if not same(value, after[name])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def replays(rank: RankInfo, what: dict[str, Replayed], ports: dict[str, int]) -> dict[str, Any]:
    return {name: replay_on_rank(at_own_port(replace(rank, master_port=ports[name])), each) for name, each in what.items()}


def test_sequences_are_the_same_at_every_layout() -> None:
    for case in CASES.values():
        for batch in batches_of(case):
            found = sorted(number for row in batch.micro_batches for mb in row for *_, number in sequences_of(mb))
            assert found == batch.ids()
