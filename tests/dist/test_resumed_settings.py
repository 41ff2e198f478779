"""A resumed trainer steps as the present configuration says, from where the checkpoint was. Real megatron-core on gloo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.checkpoints import begin_together
from tests.support.numbers import flat
from tests.support.ranks import at_own_port, run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

DONE, TOTAL = 4, 8  # optimizer steps: before the checkpoint, and of the whole run
FIRST = OptimizerConfig(schedule="cosine", lr=1e-4, min_lr=1e-5, weight_decay=0.1)
LATER = {
    "the same": FIRST,
    "half the rate": OptimizerConfig(lr=5e-5),
    "linear": OptimizerConfig(schedule="linear", lr=4e-5, min_lr=2e-5),
    "a higher floor": OptimizerConfig(schedule="cosine", lr=1e-4, min_lr=8e-5, weight_decay=0.0),
    "within a longer warm-up": OptimizerConfig(schedule="linear", lr=1e-3, warmup_steps=6),
    "wsd": OptimizerConfig(schedule="wsd", lr=3e-4, min_lr=1e-5, wsd_decay_steps=3, warmup_steps=2),
    "root": OptimizerConfig(schedule="inverse-square-root", lr=2e-4, min_lr=1.5e-4, warmup_steps=3),
    "another Adam": OptimizerConfig(lr=2e-2, beta1=0.5, beta2=0.7, eps=1e-2, weight_decay=0.8),
}


def rate_at(step: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step `step`, counted from 1, by the definitions in docs/configuration.md."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    height, floor = config.lr - config.min_lr, config.min_lr
    end = TOTAL + 1  # where those that fall have reached the floor
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse-square-root":
        return max(floor, config.lr * math.sqrt(max(config.warmup_steps, 1) / step))
    if config.schedule == "wsd":
        begin = end - config.wsd_decay_steps
        return config.lr if step <= begin else floor + height * (end - step) / config.wsd_decay_steps
    gone = (step - config.warmup_steps) / (end - config.warmup_steps)
    return floor + height * {"linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[config.schedule]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("settings")
    models = {family: write_model(root / family, family) for family in ("qwen3", "qwen3_moe")}
    return run_ranks(1, resumed, models, root)[0]


def test_rates_follow_the_present_schedule_from_where_the_run_is(found: dict[str, Any]) -> None:
    for family in ("qwen3", "qwen3_moe"):
        for name, config in LATER.items():
            steps = range(DONE + 1, TOTAL + 1)
            assert found[family, name]["rates"] == pytest.approx([rate_at(k, config) for k in steps], rel=1e-6), (family, name)
    assert found["qwen3", "half the rate"]["rates"] == [5e-5] * 4
    third, fourth = np.reshape(found["qwen3", "linear"]["rates"], (2, 2)).mean(1)  # training steps of two optimizer steps
    assert (third, fourth) == (pytest.approx(2.7778e-5, rel=1e-4), pytest.approx(2.3333e-5, rel=1e-4))


def test_the_first_update_is_adams_with_the_present_settings(found: dict[str, Any]) -> None:
    """By hand in float64, for every parameter: what the gradient was is told by the first moment."""
    for (family, name), each in found.items():
        config = LATER[name]
        rate = rate_at(DONE + 1, config)
        assert each["count"] == DONE + 1
        for key, (before, after, decayed) in each["states"].items():
            (w0, m0, v0), (w1, m1, v1) = (np.asarray(values, dtype=np.float64) for values in (before, after))
            gradient = (m1 - config.beta1 * m0) / (1 - config.beta1)
            where = f"{family}, {name}, {key}"
            second = config.beta2 * v0 + (1 - config.beta2) * gradient**2
            np.testing.assert_allclose(v1, second, rtol=2e-3, atol=1e-9 * v1.max() + 1e-16, err_msg=where)
            mean, square = m1 / (1 - config.beta1 ** (DONE + 1)), v1 / (1 - config.beta2 ** (DONE + 1))
            step = mean / (np.sqrt(square) + config.eps) + (config.weight_decay * w0 if decayed else 0.0)
            np.testing.assert_allclose(w1 - w0, -rate * step, rtol=1e-3, atol=3e-7 * max(1.0, np.abs(w0).max()), err_msg=where)
    assert {decayed for each in found.values() for _, _, decayed in each["states"].values()} == {True, False}


def test_moments_and_weights_are_those_of_the_checkpoint(found: dict[str, Any]) -> None:
    for family in ("qwen3", "qwen3_moe"):
        expected = found[family, "the same"]["states"]
        for name in LATER:
            for key, (before, _, _) in found[family, name]["states"].items():
                assert before == expected[key][0], (family, name, key)


def test_another_number_format_is_refused(tmp_path: Path) -> None:
    """torch would read float32 into bfloat16 without a word."""
    model = write_model(tmp_path / "model", "qwen3")
    (message,) = run_ranks(1, other_format, model, tmp_path)
    assert "its weights are float32, the trainer's bfloat16" in message
    assert "set model.dtype=float32" in message


# ---- in the rank


def resumed(rank: RankInfo, models: dict[str, Path], root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for family, model in models.items():
        directory = root / f"{family}-checkpoints" / "step_00000002"
        engine = start(rank, model, FIRST)
        train(engine, DONE)
        begin_together(directory)
        engine.save(directory)
        engine.close()
        for name, config in LATER.items():
            engine = start(rank, model, config)
            engine.load(directory)
            before = states(engine)
            rates = train(engine, 1)
            after = states(engine)
            updates = {int(state["step"]) for part in parts(engine) for state in part.state.values()}
            (count,) = updates
            both = {key: (before[key][0], after[key][0], after[key][1]) for key in before}
            found[family, name] = {"rates": rates + train(engine, TOTAL - DONE - 1), "states": both, "count": count}
            engine.close()
    return found


def other_format(rank: RankInfo, model: Path, root: Path) -> str:
    engine = start(rank, model, FIRST)
    train(engine, 1)
    begin_together(root / "step_00000001")
    engine.save(root / "step_00000001")
    engine.close()
    engine = start(rank, model, FIRST, "bfloat16")
    with pytest.raises(CheckpointError) as refused:
        engine.load(root / "step_00000001")
    engine.close()
    return str(refused.value)


def start(rank: RankInfo, model: Path, optimizer: OptimizerConfig, dtype: str = "float32") -> TrainerRank:
    where = at_own_port(rank)
    return TrainerRank(str(model), ParallelConfig(), optimizer, where, device="cpu", dtype=dtype, seed=1, total_steps=TOTAL)


def train(engine: TrainerRank, steps: int) -> list[float]:
    import torch

    from ctpo_megatron.algorithms import Stats

    mine = engine.place(micro_batches())

    def share(logp: Any, pack: Any, _scan: Any) -> Any:
        return -torch.where(pack.tokens.mask, logp, 0.0).sum() / 80, Stats()

    return [flat(engine.train_step(mine, share, 1.0))["lr"] for _ in range(steps)]


def parts(engine: TrainerRank) -> list[Any]:
    return [part.optimizer for part in engine.optimizer.chained_optimizers]


def states(engine: TrainerRank) -> dict[str, tuple[list[list[float]], bool]]:
    """The first 50 numbers of each parameter with both moments, and whether weight decay is for it."""
    found = {}
    for number, part in enumerate(parts(engine)):
        for at, group in enumerate(part.param_groups):
            for index, parameter in enumerate(group["params"]):
                state = part.state[parameter]
                values = (parameter, state["exp_avg"], state["exp_avg_sq"])
                rows = [value.detach().reshape(-1)[:50].tolist() for value in values]
                found[f"{number}.{at}.{index}"] = rows, group["wd_mult"] > 0
    return found
