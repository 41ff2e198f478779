"""A critic beside the policy: what one rank finds is what the definitions say, and every layout finds what one rank does.

On gloo with the real megatron-core. The value head has weights that are not 0, so values differ from token to token.
"""

from __future__ import annotations

import math
import random
import statistics
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ctpo_megatron.algorithms import LocalScan
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.objectives import TokenMean
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.loop.statistics import train_metrics
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.tensors import hf_tensors
from ctpo_megatron.record.catalogue import CRITIC, require_known
from ctpo_megatron.record.values import scalar
from ctpo_megatron.types import TrainSample
from tests.support.checkpoints import begin_together
from tests.support.families import MODELS
from tests.support.numbers import flat
from tests.support.oracles_critic import gae_by_loop, value_point
from tests.support.parity import OPTIMIZER, Found, assert_same, draw_samples, exported, largest_deviations
from tests.support.ranks import at_own_port, free_port, run_ranks
from tests.support.tiny import write_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

Head = NDArray[np.float32]
GAMMA, LAM, COEFF, CLIP, RATE = 0.97, 0.9, 0.7, 0.3, 5e-3
LAYOUTS: dict[str, tuple[str, dict[str, int]]] = {
    "DP2": ("qwen3", {"dp": 2}),
    "TP2": ("qwen3", {"tp": 2}),
    "PP2": ("qwen3", {"pp": 2}),
    "CP2": ("qwen3", {"cp": 2}),
    "EP2": ("deepseek_v3", {"dp": 2, "ep": 2}),
}
FAMILIES = ("qwen3", "deepseek_v3")
FAULTS = {  # planted in the ranks of a layout
    "the trunk's gradient is whole on each rank": "TP2",
    "advantages end at a shard's border": "CP2",
}


def algorithm_of(**critic: Any) -> AlgorithmConfig:
    options = {"weights": "shared", "coeff": COEFF, "clip": CLIP, "lr": RATE} | critic
    advantage = {"type": "gae", "gamma": GAMMA, "lam": LAM, "critic": options}
    objective = {"type": "grpo", "clip_low": 0.5, "clip_high": 1.0}
    return AlgorithmConfig(objective=objective, anchor="old", aggregation="token-mean", advantage=advantage)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family, 2, MODELS[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], saved: Path) -> dict[str, Any]:
    (found,) = run_ranks(1, at_one_rank, models, saved)
    return found


@pytest.fixture(scope="module")
def spread(models: dict[str, Path], saved: Path, alone: dict[str, Any]) -> list[dict[str, Any]]:
    assert alone, "one rank has saved what the others load"
    return run_ranks(2, at_two_ranks, models, saved, [free_port() for _ in (*LAYOUTS, *FAULTS)])


# ---- one rank against the definitions


def test_values_are_a_linear_map_of_the_last_hidden_states(models: dict[str, Path], alone: dict[str, Any]) -> None:
    """Before each token that the policy wrote, and 0 elsewhere."""
    oracle = Oracle(models["qwen3"])
    for values, sample, expected in zip(alone["values"], oracle.samples, oracle.values, strict=True):
        np.testing.assert_allclose(values, np.where(sample.mask, expected, 0.0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("weights", ["shared", "head"])
def test_the_first_optimizer_step_is_the_definition(models: dict[str, Path], alone: dict[str, Any], weights: str) -> None:
    """Loss and both gradients, by transformers and autograd, of advantages that are found token after token."""
    oracle, found = Oracle(models["qwen3"]), alone["first step"][weights]
    expected = oracle.step(trunk=weights == "shared")
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert found["critic/lr"] == RATE


def test_what_an_update_reports_is_in_the_catalogue(alone: dict[str, Any]) -> None:
    require_known(alone["metrics"])
    assert {metric.name for metric in CRITIC} <= set(alone["metrics"])


def test_the_heads_gradient_moves_nothing_else_when_it_is_alone(models: dict[str, Path]) -> None:
    """What the comparison above would not tell if both modes had one gradient."""
    shared, head = (Oracle(models["qwen3"]).step(trunk=trunk) for trunk in (True, False))
    assert abs(shared["grad_norm"] - head["grad_norm"]) > 1e-2 * head["grad_norm"]
    assert shared["critic/grad_norm"] == pytest.approx(head["critic/grad_norm"], rel=1e-6)


def test_while_it_warms_up_the_head_alone_learns(alone: dict[str, Any]) -> None:
    """To the bit, the routers' biases included; the policy's moments take its gradients in."""
    before, warm, after = alone["warm-up"]
    for name, weight in before["weights"].items():
        np.testing.assert_array_equal(warm["weights"][name], weight, err_msg=name)
    assert warm["lr"] == 0.0
    assert np.abs(warm["head"] - before["head"]).max() > 1e-4
    moved = {name for name, weight in warm["weights"].items() if np.abs(after["weights"][name] - weight).max() > 0}
    assert any(name.endswith("e_score_correction_bias") for name in moved)
    assert len(moved) > len(before["weights"]) / 2
    assert after["lr"] == OPTIMIZER.lr


def test_a_later_checkpoint_has_the_value_head(alone: dict[str, Any]) -> None:
    assert "holds a value head; set algorithm.advantage.type to gae again" in alone["without a critic"]
    assert "holds no value head" in alone["with a critic"]


def test_the_value_head_does_not_leave_the_trainer(alone: dict[str, Any]) -> None:
    """Neither to the servers, nor to what attests them, nor to a model directory; a checkpoint becomes one without it."""
    assert alone["left"] == alone["names"] == alone["converted"]
    assert not any("value_head" in key for key in alone["pieces"])


# ---- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_finds_what_one_rank_finds(alone: dict[str, Any], spread: list[dict[str, Any]], layout: str) -> None:
    """From the model, and from the checkpoint that one rank wrote: weights, value head and the moments of both."""
    expected = alone[LAYOUTS[layout][0]]
    assert_same(spread[0][layout]["found"], expected["found"], layout)
    heads = [rank[layout]["head"] for rank in spread if rank[layout]["head"] is not None]
    assert heads
    for head in heads:
        np.testing.assert_allclose(head, expected["head"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(alone: dict[str, Any], spread: list[dict[str, Any]], fault: str) -> None:
    worst = largest_deviations(spread[0][fault]["found"], alone["qwen3"]["found"])
    assert worst["weights"] > 1e-4, worst


# ---- what runs in the ranks


def at_one_rank(rank: RankInfo, models: dict[str, Path], saved: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"first step": {}}
    for family in FAMILIES:
        engine = start(rank, models[family], ParallelConfig())
        if family == "qwen3":
            placed = engine.place([mb for batch in batches_of(engine) for mb in batch])
            rows = dict(row for mb, (_, values) in pairs(engine, placed) for row in by_sequence(mb, values))
            found["values"] = [rows[number] for number in sorted(rows)]
            found["left"], found["pieces"] = sorted(exported(engine)), list(engine.pieces())
            found["names"] = sorted(tensor.name for tensor in hf_tensors(engine.shape))
        found[family] = trained(engine, saved / family, save=True)
        engine.close()
    for weights in ("shared", "head"):
        engine = start(rank, models["qwen3"], ParallelConfig(), weights=weights)
        values = update(engine, batches_of(engine)[:1], weights=weights)
        found["first step"][weights] = {name: scalar(value) for name, value in values.items() if np.ndim(value.result()) == 0}
        found["metrics"] = list(train_metrics(values))
        engine.close()
    return found | {"warm-up": warmed_up(rank, models["deepseek_v3"])} | refusals(rank, models["qwen3"], saved)


def at_two_ranks(rank: RankInfo, models: dict[str, Path], saved: Path, ports: list[int]) -> dict[str, Any]:
    found, places = {}, iter(ports)
    for name, (family, sizes) in LAYOUTS.items():
        engine = start(replace(rank, master_port=next(places)), models[family], ParallelConfig(**sizes))
        found[name] = trained(engine, saved / family)
        engine.close()
    for name, layout in FAULTS.items():
        engine = start(replace(rank, master_port=next(places)), models["qwen3"], ParallelConfig(**LAYOUTS[layout][1]))
        with planted(engine, layout):
            found[name] = trained(engine, saved / "qwen3")
        engine.close()
    return found


def planted(engine: TrainerRank, layout: str) -> AbstractContextManager[Any]:
    """The fault of a layout."""
    from ctpo_megatron.mcore import critic

    if layout == "TP2":
        return patch.object(engine_head(engine), "share", 1.0)
    estimate, cp = critic.gae, engine.parallel.cp

    def torn(*, cu_seqlens: torch.Tensor, scan: Any, **streams: Any) -> Any:
        return estimate(cu_seqlens=cu_seqlens // cp, scan=LocalScan(), **streams)

    return patch.object(critic, "gae", torn)


def start(rank: RankInfo, path: Path, parallel: ParallelConfig, **critic: Any) -> TrainerRank:
    """An engine whose value head has the weights of `head_weights`."""
    options = {"device": "cpu", "seed": 1, "moe": MoeConfig(aux_loss_coeff=0.01, bias_update_rate=0.125)}
    engine = TrainerRank(str(path), parallel, OPTIMIZER, at_own_port(rank), critic=algorithm_of(**critic).critic, **options)
    head = engine_head(engine)
    if head is not None:
        weights = torch.from_numpy(head_weights(engine.shape.hidden_size))
        with torch.no_grad():
            head.weight.copy_(weights[:-1])
            head.bias.copy_(weights[-1:])
    engine.optimizer.reload_model_params()
    return engine


def engine_head(engine: TrainerRank) -> Any:
    from ctpo_megatron.mcore.model.value_head import value_head

    return value_head(engine.models)


def head_weights(width: int) -> Head:
    """Weights, and the bias behind them."""
    return np.sin(np.arange(width + 1, dtype=np.float32) * 1.7) * np.float32(0.1)


def samples() -> list[TrainSample]:
    """Sequences of which each is rewarded at the last token that the policy wrote."""
    rng, made = random.Random(5), []
    for sample in draw_samples():
        rewards, reward = [0.0] * len(sample), rng.gauss(0.5, 1.0)
        rewards[max(place for place, wrote in enumerate(sample.mask) if wrote)] = reward
        made.append(replace(sample, advantages=[0.0] * len(sample), rewards=rewards, routed_experts=None, supports=None))
    return made


def batches_of(engine: TrainerRank) -> list[Any]:
    """This rank's micro-batches of two optimizer steps."""
    options = {"aggregation": TokenMean(), "parallel": engine.parallel, "max_tokens": 64}
    made = [build_train_batch(samples()[first : first + 6], first_id=first, **options) for first in (0, 6)]
    return [batch.micro_batches[engine.coords.dp_rank] for batch in made]


def update(engine: TrainerRank, batches: list[Any], version: int = 0, **critic: Any) -> Any:
    from ctpo_megatron.mcore.policy import update_policy

    options = {"temperature": 1.0, "drift": DriftBounds(), "version": version}
    return update_policy(engine, batches, algorithm=algorithm_of(**critic), **options)


def trained(engine: TrainerRank, directory: Path, *, save: bool = False) -> dict[str, Any]:
    """Two updates of two optimizer steps each; between them the engine writes a checkpoint, or takes that of one rank.

    Weights and value head after the second; None for a head before the last pipeline stage.
    """
    steps = [flat(update(engine, batches_of(engine)))]
    if save:
        begin_together(directory)
        engine.save(directory)
    else:
        engine.load(directory)
    steps.append(flat(update(engine, batches_of(engine))))
    return {"found": Found(steps, exported(engine)), "head": head_of(engine)}


def head_of(engine: TrainerRank) -> Head | None:
    head = engine_head(engine)
    return None if head is None else torch.cat([head.weight.detach().flatten(), head.bias.detach()]).numpy().copy()


def pairs(engine: TrainerRank, placed: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(placed, engine.logp_and_values(placed, 1.0), strict=True))


def by_sequence(mb: Any, stream: Any) -> list[Any]:
    """The samples' numbers of a micro-batch, each with its part of a stream, without padding."""
    begins = mb.sequences.cu_seqlens.tolist()
    spans = zip(mb.sequences.ids.tolist(), begins, mb.sequences.lengths.tolist(), strict=False)
    return [(number, stream[begin : begin + length].numpy()) for number, begin, length in spans]


def warmed_up(rank: RankInfo, path: Path) -> list[dict[str, Any]]:
    """Before an update, after one that warms up, and after one that does not."""
    engine = start(rank, path, ParallelConfig(), warmup_steps=1)
    found = [{"weights": exported(engine), "head": head_of(engine)}]
    for version in (0, 1):
        values = update(engine, batches_of(engine), version, warmup_steps=1)
        found.append({"weights": exported(engine), "head": head_of(engine), "lr": scalar(values["lr"])})
    engine.close()
    return found


def refusals(rank: RankInfo, path: Path, saved: Path) -> dict[str, Any]:
    """What is said where one side has a value head and the other none; and what becomes of it in a model directory."""
    from ctpo_megatron.mcore.checkpoint.convert import weights_to_hf

    found: dict[str, Any] = {}
    engine = TrainerRank(str(path), ParallelConfig(), OPTIMIZER, at_own_port(rank), device="cpu", seed=1)
    begin_together(saved / "plain")
    engine.save(saved / "plain")
    with pytest.raises(CheckpointError) as error:
        engine.load(saved / "qwen3")
    found["without a critic"] = str(error.value)
    engine.close()
    engine = start(rank, path, ParallelConfig())
    with pytest.raises(CheckpointError) as error:
        engine.load(saved / "plain")
    found["with a critic"] = str(error.value)
    engine.close()
    out = saved / "converted"
    weights_to_hf(at_own_port(rank), str(saved / "qwen3"), str(out), ParallelConfig())
    from safetensors import safe_open

    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        found["converted"] = sorted(file.keys())
    return found


# ---- the definitions


class Oracle:
    """Values by transformers, advantages token after token, and the gradient of the first optimizer step by autograd."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.samples = samples()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        weights = torch.from_numpy(head_weights(self.model.config.hidden_size))
        self.weight, self.bias = weights[:-1].clone().requires_grad_(), weights[-1:].clone().requires_grad_()
        self.hidden = [self.model.model(torch.tensor([each.input_ids])).last_hidden_state[0] for each in self.samples]

    @property
    def values(self) -> list[NDArray[np.float32]]:
        return [(hidden @ self.weight + self.bias).detach().numpy() for hidden in self.hidden]

    def step(self, *, trunk: bool) -> dict[str, float]:
        """Numbers of the first optimizer step, of the first six samples, in an update by these alone."""
        first = range(6)
        estimates = [
            gae_by_loop(sample.rewards or [], values.tolist(), sample.mask, GAMMA, LAM)
            for sample, values in zip(self.samples, self.values, strict=True)
        ]
        written = [(i, t) for i in first for t, wrote in enumerate(self.samples[i].mask) if wrote]
        raw, returns = ([estimates[i][kind][t] for i, t in written] for kind in (0, 1))
        mean = math.fsum(raw) / len(raw)
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in raw) / len(raw))
        loss, error, misses = torch.zeros(()), 0.0, []
        for (i, t), advantage, target in zip(written, raw, returns, strict=True):
            hidden = self.hidden[i][t]
            logp = self.model.lm_head(hidden).log_softmax(-1)[self.samples[i].labels[t]]
            value = (hidden if trunk else hidden.detach()) @ self.weight + self.bias.squeeze()
            white = (advantage - mean) / (deviation + 1e-6)
            loss = loss - white * (logp - logp.detach()).exp() + COEFF * 0.5 * (value - target) ** 2
            error += 2 * value_point(float(value.detach()), float(value.detach()), target, CLIP)[0]
            misses.append(target - float(value.detach()))
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(loss / len(written), [*parameters, self.weight, self.bias])
        centre = math.fsum(returns) / len(returns)
        return {
            "loss": float(loss.detach()) / len(written),
            "grad_norm": float(torch.nn.utils.get_total_norm(gradients[: len(parameters)])),
            "critic/grad_norm": float(torch.nn.utils.get_total_norm(gradients[len(parameters) :])),
            "critic/loss": 0.5 * error / len(written),
            "critic/return": centre,
            "critic/advantage": mean,
            "critic/advantage_std": deviation,
            "critic/explained_variance": 1 - statistics.pvariance(misses) / statistics.pvariance(returns),
            "critic/clip_fraction": 0.0,
        }
