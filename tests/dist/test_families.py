"""Every model family: the portable engine against transformers, log-probs and gradients tensor by tensor, at several layouts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.algorithms import Stats
from ctpo_megatron.config.model import MoeConfig, ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.checkpoints import begin_together
from tests.support.families import DEEP, MODELS, TEMPERATURE, Z_LOSS, Reference, reference, write_family
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import micro_batches

pytestmark = pytest.mark.dist

AGREEMENT = 1e-5  # of log-probs, and of gradients relative to the largest of their tensor
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
RATE = 0.125

MIXTURES = [name for name, options in MODELS.items() if "num_experts_per_tok" in options]
NEW = ("deepseek_v3", "glm4_moe")
RECOMPUTE = [("deepseek_v3", {"recompute": "selective"}), ("deepseek_v3", {"recompute": "full"})]
ONE_RANK: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in MODELS), *RECOMPUTE]
TWO_RANKS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"tp": 2}) for name in MODELS),
    *((name, {"dp": 2, "ep": 2}) for name in MIXTURES),
    *((name, {"cp": 2}) for name in (*NEW, "qwen3_yarn")),
    *((name, {"tp": 2, "etp": 2}) for name in (*NEW, "mixtral")),
    *((name, {"pp": 2}) for name in DEEP),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_family(tmp_path_factory.mktemp(name), name) for name in (*MODELS, *DEEP)}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, Reference]:
    return {name: reference(path) for name, path in models.items()}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that takes one rank, in one process."""
    ports = [free_port() for _ in range(len(ONE_RANK) + 6)]
    (found,) = run_ranks(1, by_itself, models, with_mtp_layer(models, tmp_path_factory.mktemp("mtp")), ports)
    return found


def with_mtp_layer(models: dict[str, Path], directory: Path) -> Path:
    """A model whose files hold a layer of multi-token prediction."""
    from safetensors.torch import load_file, save_file

    source = directory / "source"
    shutil.copytree(models["glm4_moe"], source)
    weights = load_file(source / "model.safetensors")
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3), "model.layers.2.mlp.gate.weight": torch.ones(2)}
    save_file(weights | extra, source / "model.safetensors")
    return source


def test_families_equal_transformers(alone: dict[str, Any], models: dict[str, Path], references: dict[str, Reference]) -> None:
    check_cases(ONE_RANK, [alone["families"]], models, references)


def test_families_on_two_ranks(models: dict[str, Path], references: dict[str, Reference]) -> None:
    ranks = run_ranks(2, pair, models, [free_port() for _ in range(len(TWO_RANKS) + 1)])
    check_cases(TWO_RANKS, [rank["families"] for rank in ranks], models, references)
    # why latent attention has down-projections of its own: were this the sum over ranks, megatron's would do
    assert [rank["gathered"] for rank in ranks] == [1.0, 2.0]


def test_the_balancing_bias(alone: dict[str, Any], models: dict[str, Path], references: dict[str, Reference]) -> None:
    """It moves by the rate, towards experts with fewer tokens; stays put at 0; is never 16-bit; is resumed."""
    found = alone["biases"]
    before = stored(models["deepseek_v3"])[BIAS]
    counts = references["deepseek_v3"].expert_counts["model.layers.1.mlp.gate"]
    expected = before + RATE * np.sign(counts.mean() - counts).astype(np.float32)
    assert (expected != before).sum() >= 4
    np.testing.assert_allclose(found["moved"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found["resumed"], found["moved"])
    np.testing.assert_array_equal(found["at rate 0"], before)
    assert found["bfloat16"].dtype == np.float32
    np.testing.assert_array_equal(found["bfloat16"], before)


def test_z_loss(alone: dict[str, Any], models: dict[str, Path], references: dict[str, Reference]) -> None:
    """Its gradient, next to that of the loss, is the derivative of its definition."""
    expected, router = reference(models["glm4_moe"], Z_LOSS).gradients, "model.layers.1.mlp.gate.weight"
    difference = expected[router] - references["glm4_moe"].gradients[router]
    assert np.abs(difference).max() > 0.01 * np.abs(expected[router]).max()
    check_gradients(alone["z_loss"], expected, "z-loss")


def test_multi_token_prediction_is_left_out(alone: dict[str, Any], models: dict[str, Path]) -> None:
    source, saved = alone["mtp"], alone["mtp"].with_name("saved")
    assert json.loads((source / "config.json").read_text())["num_nextn_predict_layers"] == 1
    check_weights(stored(saved), stored(models["glm4_moe"]), "saved")
    assert json.loads((saved / "config.json").read_text())["num_nextn_predict_layers"] == 0


def check_cases(
    cases: list[tuple[str, dict[str, Any]]],
    ranks: list[list[dict[str, Any]]],
    models: dict[str, Path],
    references: dict[str, Reference],
) -> None:
    """Weights out are the weights that went in, log-probs and gradients are those of transformers."""
    for number, (name, layout) in enumerate(cases):
        where, found, expected = f"{name} {layout}", [rank[number] for rank in ranks], references[name]
        check_weights(found[0]["exported"], stored(models[name]), where)
        check_logp(found, expected.logp, where)
        check_gradients(found[0]["gradients"], expected.gradients, where)


def check_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, (where, name)
        np.testing.assert_array_equal(found[name], value, err_msg=f"{where}, {name}")


def check_logp(ranks: list[dict[str, Any]], expected: list[np.ndarray], where: str) -> None:
    """Each rank has its part: of the packs under data parallelism, of each pack under context parallelism."""
    seen = 0
    for found in ranks:
        for number, mine in found["logp"].items():
            wanted = expected[number][found["rows"][number]]
            np.testing.assert_allclose(mine, wanted, rtol=0, atol=AGREEMENT, err_msg=f"{where}, pack {number}")
            seen += mine.size
    assert seen >= sum(logp.size for logp in expected), where


def check_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], where: str) -> None:
    """Every parameter's."""
    assert {name for name in found if not name.endswith("e_score_correction_bias")} == expected.keys(), where
    for name, wanted in expected.items():
        largest = np.abs(wanted).max()
        assert largest > 0, (where, name)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=AGREEMENT * largest, err_msg=f"{where}, {name}")


def stored(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


# ---- what runs in the ranks


def start(rank: RankInfo, path: Path, layout: dict[str, Any], dtype: str = "float32", **moe: float) -> TrainerRank:
    layout = dict(layout)
    options = {"recompute": layout.pop("recompute", "none"), "moe": MoeConfig(**{"aux_loss_coeff": 0.0, **moe})}
    optimizer = OptimizerConfig(lr=1e-4)
    return TrainerRank(str(path), ParallelConfig(**layout), optimizer, rank, device="cpu", dtype=dtype, seed=1, **options)


def by_itself(rank: RankInfo, models: dict[str, Path], with_mtp: Path, ports: list[int]) -> dict[str, Any]:
    *ports, z_port, mtp_port = ports
    found = {
        "families": several(rank, ONE_RANK, models, ports[4:]),
        "biases": biases(rank, models["deepseek_v3"], ports[:4]),
        "z_loss": z_loss(replace(rank, master_port=z_port), models["glm4_moe"]),
        "mtp": with_mtp,
    }
    engine = start(replace(rank, master_port=mtp_port), with_mtp, {})
    engine.save_hf(with_mtp.with_name("saved"))
    engine.close()
    return found


def pair(rank: RankInfo, models: dict[str, Path], ports: list[int]) -> dict[str, Any]:
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    families = several(rank, TWO_RANKS, models, ports[1:])
    engine = start(replace(rank, master_port=ports[0]), models["deepseek_v3"], {"tp": 2})
    mine = torch.zeros(1, 1, requires_grad=True)
    (gather_from_tensor_model_parallel_region(mine).sum() * (rank.rank + 1)).backward()
    engine.close()
    return {"families": families, "gathered": mine.grad.item()}


def several(
    rank: RankInfo, cases: list[tuple[str, dict[str, Any]]], models: dict[str, Path], ports: list[int]
) -> list[dict[str, Any]]:
    return [
        exercise(replace(rank, master_port=port), models[name], layout) for (name, layout), port in zip(cases, ports, strict=True)
    ]


def exercise(rank: RankInfo, path: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Weights as exported, log-probs by pack, which of the pack's tokens they belong to, and gradients under their file names."""
    engine = start(rank, path, layout)
    packs, per_rank = micro_batches(), 4 // engine.parallel.dp
    first = engine.coords.dp_rank * per_rank
    # carried through the cut of context parallelism: where each token stood
    places = [torch.arange(pack.tokens.input_ids.numel(), dtype=torch.float32) for pack in packs]
    mine = engine.place([packs[i].with_streams(rollout_logp=places[i]) for i in range(first, first + per_rank)])
    logp = {first + i: x.numpy() for i, x in enumerate(engine.logp(mine, TEMPERATURE))}
    rows = {first + i: pack.tokens.rollout_logp.long().numpy() for i, pack in enumerate(mine)}
    found = {"exported": exported(engine), "logp": logp, "rows": rows, "gradients": gradients(engine, mine)}
    engine.close()
    return found


def exported(engine: TrainerRank) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for bucket in engine.stream(100_000, to=0) for name, tensor in bucket}


def gradients(engine: TrainerRank, mine: list[Any]) -> dict[str, np.ndarray]:
    """Of the mean negative log-prob, gathered like weights: by exporting them in the weights' place."""
    from ctpo_megatron.mcore.host import megatron_region

    tokens = sum(int(pack.tokens.mask.sum()) for pack in micro_batches())

    def share(logp: Any, pack: Any, _scan: Any) -> Any:
        return -logp[pack.tokens.mask].sum() / tokens, Stats()

    with megatron_region(engine.device):
        engine._stepper.forward_backward(mine, share, TEMPERATURE)
    with torch.no_grad():
        for model in engine.models:
            for buffer in (*model.buffers, *model.expert_parallel_buffers):
                join_shards(buffer)
            for parameter in model.parameters():
                parameter.copy_(parameter.main_grad)
    return exported(engine)


def join_shards(buffer: Any) -> None:
    """Gradients that the distributed optimizer left spread over data-parallel ranks."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        shards = list(bucket.grad_data.chunk(group.size()))
        dist.all_gather(shards, shards[group.rank()].clone(), group=group)


def biases(rank: RankInfo, path: Path, ports: list[int]) -> dict[str, np.ndarray]:
    found = {}
    for (case, dtype, rate), port in zip(
        [("moved", "float32", RATE), ("at rate 0", "float32", 0.0), ("bfloat16", "bfloat16", 0.0)], ports[1:], strict=True
    ):
        engine = start(replace(rank, master_port=port), path, {}, dtype, bias_update_rate=rate)
        mine = engine.place(micro_batches())
        engine.logp(mine, TEMPERATURE)
        engine.train_step(mine, lambda logp, pack, _scan: (-logp[pack.tokens.mask].sum() / 100, Stats()), TEMPERATURE)
        found[case] = bias_of(engine)
        if case == "moved":
            begin_together(path.with_name("checkpoint"))
            engine.save(path.with_name("checkpoint"))
        engine.close()
    engine = start(replace(rank, master_port=ports[0]), path, {})
    engine.load(path.with_name("checkpoint"))
    found["resumed"] = bias_of(engine)
    engine.close()
    return found


def bias_of(engine: TrainerRank) -> np.ndarray:
    return next(tensor.numpy().copy() for bucket in engine.stream(100_000, to=0) for name, tensor in bucket if name == BIAS)


def z_loss(rank: RankInfo, path: Path) -> dict[str, np.ndarray]:
    engine = start(rank, path, {}, z_loss_coeff=Z_LOSS)
    found = gradients(engine, engine.place(micro_batches()))
    engine.close()
    return found
